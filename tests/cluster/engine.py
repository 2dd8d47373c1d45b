"""A Docker engine of one's own on this machine: its images, networks and containers meet no other's, and go with it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from tests.launch.jobs import ROOT

COMMANDS = ("dockerd", "docker", "docker-compose", "debootstrap", "setpriv")
PACKAGES = "docker.io docker-compose debootstrap"
BASE, IMAGE = "base:local", "syncbn:test"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# No iptables: nothing of the machine's own rules is touched, and containers of one network reach each other without
DAEMON = [
    "--bridge=none", "--iptables=false", "--ip-masq=false", "--ip-forward=false",
    "--default-address-pool=base=10.213.0.0/16,size=24",
]  # fmt: skip


class Engine:
    """The engine whose daemon runs with all of its state in one folder."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "dockerd.log"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DOCKER", "COMPOSE", "WANDB"))}
        # The client that came with the daemon: a newer one cannot build without a plugin
        path = f"/usr/bin:{os.environ['PATH']}"
        self.environment = {**kept, "PATH": path, "DOCKER_HOST": f"unix://{folder}/docker.sock", "DOCKER_BUILDKIT": "1"}

    def run(self, *command, timeout_s=300, **environment):
        """The finished command; what it said is its stdout, stderr included."""
        return subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def ask(self, *command, **options):
        """What a command that has to succeed prints."""
        done = self.run(*command, **options)
        assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}"
        return done.stdout.strip()

    def docker(self, *words, **options):
        return self.ask("docker", *words, **options)

    def inspect(self, name, field):
        """A field of what `docker inspect` tells of a container or image: inspect(name, ".State.Pid")."""
        return json.loads(self.docker("inspect", "--format", f"{{{{json {field}}}}}", name))

    def build(self, context=ROOT, tag=IMAGE):
        """Build the image of a folder, over the machine's own network and package index: what the build said."""
        index = self.folder / "pip.conf"
        index.write_text(pip_settings())
        return self.docker(
            "build", "--progress=plain", "--network=host", f"--secret=id=pip,src={index}",
            f"--build-arg=BASE_IMAGE={BASE}", f"--tag={tag}", context, timeout_s=1200,
        )  # fmt: skip

    def import_base(self):
        """Make a small Debian with Python, as no image can be fetched."""
        if self.docker("images", "--quiet", BASE):
            return
        root = self.folder / "base"
        packages = "--include=python3,python3-venv,ca-certificates"
        self.ask("debootstrap", "--variant=minbase", packages, "bookworm", root, timeout_s=900)
        shutil.copyfile(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
        self.ask("sh", "-c", f"tar -C {root} -c . | docker import - {BASE}")
        shutil.rmtree(root)

    def remove_all(self):
        """Remove its containers, networks and volumes; images stay."""
        if containers := self.docker("ps", "--all", "--quiet").split():
            self.docker("rm", "--force", "--volumes", *containers)
        self.docker("network", "prune", "--force")
        self.docker("volume", "prune", "--force")


@contextmanager
def engine(folder, *, keep=False):
    """An engine in the folder, which is removed with it; keep: leave the folder with its images for the next time."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Engine(folder)
    places = [f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid"]
    # The daemon ends with this process, even if that is killed
    command = ["setpriv", "--pdeathsig=TERM", "dockerd", f"--host=unix://{folder}/docker.sock", *places, *DAEMON]
    with made.log.open("wb") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log, env=made.environment)
    try:
        _until_ready(made, daemon)
        made.remove_all()
        made.docker("network", "create", "here")
        yield made
        made.remove_all()
    finally:
        daemon.terminate()
        try:
            daemon.wait(60)
        finally:
            _unmount(folder)
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)


def _until_ready(made, daemon, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while made.run("docker", "info").returncode != 0:
        assert daemon.poll() is None, f"dockerd ended:\n{made.log.read_text()}"
        assert time.monotonic() < deadline, f"dockerd is not ready after {timeout_s} s:\n{made.log.read_text()}"
        time.sleep(0.2)


def _unmount(folder):
    """Unmount what a daemon that was killed has left, so that removing the folder removes nothing else."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed([m for m in mounts if m.startswith(f"{folder}/")]):
        subprocess.run(["umount", "--lazy", mount], check=False)


def pip_settings():
    """A pip.conf of this machine's own settings, as far as they mean something elsewhere."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = {}
    for scope, key, value in re.findall(r"^(\S+)\.([\w-]+)='(.*)'$", listed, re.MULTILINE):
        if key in ("index-url", "extra-index-url", "trusted-host") and "file:" not in value:
            settings.setdefault(key, value) if scope == "global" else settings.update({key: value})
    return "\n".join(["[global]", f"cert = {CERTIFICATES}", *(f"{k} = {v}" for k, v in settings.items()), ""])


def until(condition, timeout_s=180.0, log=lambda: ""):
    """Wait until the condition holds: its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still waiting after {timeout_s} s:\n{log()}"
        time.sleep(0.2)
    return value


if __name__ == "__main__":  # make the image beforehand, for SYNCBN_TEST_ENGINE: python -m tests.cluster.engine FOLDER
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with engine(Path(sys.argv[1]), keep=True) as own:
        own.import_base()
        own.build()
