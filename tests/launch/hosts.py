"""Two hosts of one's own on this machine, network namespaces, and the cable between them."""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="network namespaces are made by root, with ip (apt-get install iproute2)",
)


class Hosts:
    """Two network namespaces joined by a cable; host i has address(i) on eth0."""

    def __init__(self):
        self.names = [f"syncbn-{os.getpid()}-{i}" for i in range(2)]

    @staticmethod
    def address(host):
        return f"10.77.0.{host + 1}"

    def on(self, host):
        """What makes a command run on the host."""
        return ["ip", "netns", "exec", self.names[host]]

    def cut(self):
        """Let the cable carry nothing: no end is told, each waits for the other."""
        ip("-n", self.names[1], "link", "set", "eth0", "down")

    def mend(self):
        ip("-n", self.names[1], "link", "set", "eth0", "up")

    def give_up_after(self, retries):
        """Give a silent connection up after 0.2 s × (2^(retries + 1) - 1); Linux has 15, a quarter of an hour."""
        for host in range(2):
            run(*self.on(host), "sh", "-c", f"echo {retries} > /proc/sys/net/ipv4/tcp_retries2")

    def connect(self):
        for name in self.names:
            ip("netns", "add", name)
        here, there = (["eth0", "netns", name] for name in self.names)
        ip("link", "add", *here, "type", "veth", "peer", "name", *there)
        for host, name in enumerate(self.names):
            ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            for device in "lo", "eth0":
                ip("-n", name, "link", "set", device, "up")

    def remove(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextmanager
def two_hosts():
    hosts = Hosts()
    try:
        hosts.connect()
        yield hosts
    finally:
        hosts.remove()


def ip(*arguments):
    run("ip", *arguments)


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
