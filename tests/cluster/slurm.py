"""A Slurm of two nodes on this machine: its own munged, slurmctld and two slurmd, all of their state in one folder."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.launch.jobs import ROOT, environment_of, processes, saved_steps

# No port, folder or user of the system's own. The nodes claim more cores than there may be: two ranks each have room
CONFIG = """
ClusterName=syncbn
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=600 State=UP
"""
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "setpriv")
PACKAGES = "slurm-wlm munge"
LONG_S = 600  # a life of a job takes a quarter of a minute on two cores that have nothing else to do
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Slurm:
    """What a user does on a login node, in the folder of train.py."""

    def __init__(self, folder):
        self.folder = folder
        apart = ("WANDB", "OMP_", "MALLOC", "SLURM", "SBATCH", "PET_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(apart)}
        path = f"{Path(sys.executable).parent}:{kept['PATH']}"
        self.environment = {**kept, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command, cwd=ROOT, **environment):
        """The finished command."""
        return subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=LONG_S,
            check=False,
        )

    def ask(self, *command, **environment):
        """What a command that has to succeed prints."""
        done = self.run(*command, **environment)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def train(self, root, *arguments, options=(), **environment):
        """Submit launch/slurm.sbatch with options of sbatch's; its runs go under root."""
        log = root.with_name(f"{root.name}-{time.monotonic_ns()}.log")
        sbatch = ["sbatch", "--parsable", f"--output={log}", *options, "launch/slurm.sbatch"]
        number = self.ask(*sbatch, *arguments, f"run.root={root}", **environment)
        return Submitted(self, number, root / "r", log)

    def members(self):
        """All processes of it and of its jobs."""
        return [pid for pid in processes() if environment_of(pid).get("SLURM_CONF") == str(self.folder / "slurm.conf")]


class Submitted:
    """A job that Slurm has: its number, the run's folder, and the file of what it says."""

    def __init__(self, slurm, number, folder, log):
        self.slurm, self.number, self.folder, self.log = slurm, number, folder, log

    @property
    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    @property
    def facts(self):
        """What `scontrol show job` tells of it."""
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm.ask("scontrol", "show", "job", "--oneliner", self.number)))

    def until(self, condition, timeout_s=LONG_S):
        """Wait until the condition holds: its value."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            state = self.facts["JobState"]
            assert state not in OVER, f"{state}:\n{self.said}"
            assert time.monotonic() < deadline, f"still waiting after {timeout_s} s, {state}:\n{self.said}"
            time.sleep(0.1)
        return value

    def until_past(self, step):
        """Wait until a checkpoint of the step, or of a later one, is there."""
        self.until(lambda: max(saved_steps(self.folder), default=0) >= step)

    def until_queued_again(self):
        self.until(lambda: (facts := self.facts)["JobState"] == "PENDING" and facts["Restarts"] == "1")

    def start_now(self, **changes):
        """Do not wait for the two minutes that Slurm leaves between a job's end and its next start."""
        time.sleep(2)  # slurmd does not start a job anew in the second in which it was killed
        words = [f"{name}={value}" for name, value in changes.items()]
        self.slurm.ask("scontrol", "update", f"jobid={self.number}", "StartTime=now", *words)

    def tell(self):
        """What it said, and what Slurm's daemons said of late."""
        return f"{self.said}\n{logs(self.slurm.folder, lines=40)}"

    def preempted_at(self):
        """The step at which it said that it was."""
        (line,) = (line for line in self.said.splitlines() if line.startswith("preempted at step"))
        return int(line.split()[3].rstrip(":"))

    def end(self):
        """Wait until it is over: its state and exit code."""
        deadline = time.monotonic() + LONG_S
        while (facts := self.facts)["JobState"] not in OVER:
            assert time.monotonic() < deadline, f"{facts['JobState']}:\n{self.said}"
            time.sleep(0.1)
        return facts["JobState"], int(facts["ExitCode"].partition(":")[0])


@contextmanager
def two_nodes():
    """A Slurm that is up, and gone afterwards with all of its jobs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not pytest's, whose long names leave no room for sockets
    slurm = Slurm(folder)
    try:
        with ExitStack() as daemons:
            start(slurm, daemons)
            yield slurm
            jobs = slurm.ask("squeue", "--noheader", "--format=%A").split()
            slurm.run("scancel", *jobs)
    finally:
        for pid in slurm.members():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder)


def start(slurm, daemons):
    folder = slurm.folder
    folder.chmod(0o755)  # munged has others' sockets in mind
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    for node in "n0", "n1":
        (folder / node).mkdir()
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, ports=free_ports(3)))
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]
    for name, command in {
        "munged": ["munged", "--foreground", "--force", *munge],
        "slurmctld": ["slurmctld", "-D"],
        "slurmd0": ["slurmd", "-D", "-N", "n0"],
        "slurmd1": ["slurmd", "-D", "-N", "n1"],
    }.items():
        daemons.enter_context(daemon(command, folder / f"{name}.log", slurm.environment))
        if name == "munged":
            until(lambda: (folder / "munge.socket").exists(), lambda: (folder / "munged.log").read_text())
    until(lambda: slurm.run("sinfo", "--noheader", "--format=%D %t").stdout.strip() == "2 idle", lambda: logs(folder))


@contextmanager
def daemon(command, log, environment):
    """A process that ends with this one, whatever happens."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command], env=environment, stdout=file, stderr=file
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(condition, otherwise, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.1)


def logs(folder, lines=1000):
    """The last so many lines of each daemon."""
    return "\n".join("\n".join(path.read_text().splitlines()[-lines:]) for path in folder.glob("*.log"))


def free_ports(count):
    with ExitStack() as taken:
        sockets = [taken.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
