"""Real jobs to be disturbed: started in the background, watched, killed, and looked after."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "train.py"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Figures that differ from run to run, as they are times
TIMES = ("time_s", "train/images_per_s", "train/step_ms", "train/data_wait_share")
# torch 2.15 loses its store in a restart without it
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
STANDALONE = [*TORCHRUN, "--standalone", "--nproc-per-node=2"]


class Job:
    """A job on this machine, its output in files."""

    def __init__(self, command, *arguments, root, cwd=ROOT, **environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "OMP_", "MALLOC"))}
        self.root, self.log = root, root.with_name(f"{root.name}-{time.monotonic_ns()}.log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments, f"run.root={root}"],
                cwd=cwd,
                env={**kept, "PYTHONPATH": str(ROOT), **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                # A shell has what it runs behind ignore SIGINT, and a job then does so too
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.seen = set()

    @property
    def said(self):
        return self.log.read_text()

    @property
    def ranks(self):
        """{rank: pid} of the ranks that run now."""
        started = children(self.process.pid)
        forked = set().union(*(children(pid) for pid in started if is_nursery(pid)))
        return {rank: pid for pid in started | forked if (rank := rank_of(pid)) is not None}

    @property
    def nurseries(self):
        """The processes that ranks are forked from."""
        return {pid for pid in children(self.process.pid) if is_nursery(pid)}

    def until(self, condition, timeout_s=300.0):
        """Wait until the condition holds: its value."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            self.seen |= descendants(self.process.pid)
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said}"
            assert time.monotonic() < deadline, f"still waiting after {timeout_s} s:\n{self.said}"
            time.sleep(0.01)
        return value

    def until_saved(self, step, name="r"):
        """Wait until the checkpoint of a step is there, and is what the run goes on from."""
        folder = self.root / name
        self.until(lambda: step in saved_steps(folder) and latest_step(folder) >= step)

    def until_past(self, step, name="r"):
        """Wait until a checkpoint of the step, or of a later one, is there."""
        self.until(lambda: max(saved_steps(self.root / name), default=0) >= step)

    def wait(self, timeout_s=400.0):
        """Wait until the job has ended by itself: its exit code."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            self.seen |= descendants(self.process.pid)
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {timeout_s} s:\n{self.said}")
            time.sleep(0.05)
        return self.process.returncode

    def kill(self):
        """Kill the job and all of its processes."""
        everyone = self.seen | descendants(self.process.pid) | {self.process.pid}
        for pid in everyone:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def left_over(self, timeout_s=10.0):
        """The processes of the job that are still there, so long after its end."""
        deadline = time.monotonic() + timeout_s
        while (alive := {pid for pid in self.seen if running(pid)}) and time.monotonic() < deadline:
            time.sleep(0.05)
        return {pid: command_of(pid) for pid in alive}


@contextmanager
def job(command, *arguments, **options):
    """A job that is not left running, whatever happens."""
    started = Job(command, *arguments, **options)
    try:
        yield started
    finally:
        started.kill()


def finished(command, *arguments, root, **options):
    """A job that has ended: its exit code, and what it said."""
    with job(command, *arguments, root=root, **options) as started:
        return started.wait(), started.said


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def processes():
    return {int(name) for name in os.listdir("/proc") if name.isdecimal()}


def children(pid):
    pids = set()
    with suppress(OSError):  # it may end at any moment, and its threads too
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                pids.update(map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split()))
    return pids


def descendants(pid):
    direct = children(pid)
    return direct.union(*(descendants(child) for child in direct))


def environment_of(pid):
    with suppress(OSError):
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        return dict(pair.partition("=")[::2] for pair in pairs)
    return {}


def is_nursery(pid):
    return "syncbn.trainer.job.nursery" in command_of(pid)


def rank_of(pid):
    """By what it shows of itself, or else by the environment that a command was given; None if it is none."""
    if shown := re.match(r"syncbn: rank (\d+) of", command_of(pid)):
        return int(shown[1])
    rank = environment_of(pid).get("RANK")
    return None if rank is None else int(rank)


def command_of(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def running(pid):
    with suppress(OSError):
        # The first thread ends as a zombie, and the process keeps its files and locks until the last one has ended
        ended = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return not ended or len(os.listdir(f"/proc/{pid}/task")) > 1
    return False


def saved_steps(folder):
    return sorted(int(path.stem[5:]) for path in (folder / "checkpoints").glob("step_*.pt"))


def latest_step(folder):
    """The step of the checkpoint that the pointer names; it is written after that."""
    pointer = folder / "checkpoints" / "latest"
    return int(pointer.read_text()[5:-3]) if pointer.exists() else 0


def state(folder):
    """The latest checkpoint of a run."""
    latest = (folder / "checkpoints" / "latest").read_text()
    return torch.load(folder / "checkpoints" / latest, weights_only=True)


def figures(folder):
    """The lines of metrics.jsonl, without what is a time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def differing(one, other, path=""):
    """Where two states differ in a bit; what is told of the processes themselves does not count."""
    if path in (".config", ".watch.record", ".watch.wandb"):
        return []
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(*(bits(t) for t in (one, other))) else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [path]
        return [d for key in one for d in differing(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [path]
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differing(*pair, f"{path}[{i}]")]
    return [] if one == other or (one != one and other != other) else [path]


def bits(tensor):
    """Its shape and bytes, by which even NaN equals itself."""
    shape = torch.tensor(tensor.shape, dtype=torch.int64)
    return torch.cat([shape.view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)])
