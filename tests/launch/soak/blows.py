"""Blows to a running job: at which moment of its life, to which of its processes, and what must come of them."""

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.launch.jobs import Job, children, environment_of, processes, running, saved_steps

MARK = "SYNCBN_SOAK"  # the variable in the environment of all of a job's processes, whoever their parent is
PATIENCE_S = 240.0

# How often each is drawn, where it can be
MOMENTS = {"start-up": 8, "step": 6, "save": 4, "eval": 2}
VICTIMS = {
    "one rank": 3,
    "both ranks": 2,
    "loading process": 2,
    "launcher": 3,
    "launcher, SIGTERM": 2,
    "launcher, SIGTERM, then SIGKILL": 1,
    "one rank, stopped before": 1,
}


class Failed(AssertionError):
    """What was to hold of a job did not."""


@dataclass
class Blow:
    """One, and what came of it."""

    phase: str  # what the job was doing: launching, starting, step, save, eval, end
    victim: str
    step: int  # the last that had been written down
    torn: int = 0  # files that it left half-written
    exit_code: int | None = None  # of the launcher, if the blow ended it
    recovered_s: float | None = None  # until it trained again, if the next blow did not come before that


class Life:
    """A job under the same command, however often it has to be given."""

    def __init__(self, command: list[str], root: Path, *, steps: int, eval_every: int, mark: str, start_s: float):
        self.command, self.root, self.folder = command, root, root / "r"
        self.steps, self.eval_every, self.mark, self.start_s = steps, eval_every, mark, start_s
        self.temporary = root.with_name(f"{root.name}-tmp")
        self.temporary.mkdir(exist_ok=True)
        self.job: Job | None = None
        self.restarts = 0
        self.since = self.struck_at = time.time()  # when these processes were started; and the ones before struck
        self.struck: Blow | None = None
        self.trained = False  # whether these processes have been seen to
        self.scan: tuple[tuple[dict[int, int], set[int]], set[int]] | None = None  # members and ours, a moment ago

    def start(self, restarts: int) -> Job:
        """Give the command: the job."""
        self.since, self.restarts, self.trained = time.time(), restarts, False
        environment = {MARK: self.mark, "TMPDIR": str(self.temporary)}
        arguments = [*self.command, f"launch.max_restarts={restarts}"]
        self.job = Job(arguments, root=self.root, **environment)  # pyright: ignore[reportArgumentType]
        return self.job

    def ours(self) -> set[int]:
        """Every process of the job, orphans too."""
        return {pid for pid in processes() if running(pid) and environment_of(pid).get(MARK) == self.mark}

    def members(self) -> tuple[dict[int, int], set[int]]:
        """{rank: pid}, and the pids of the processes that load data for them."""
        assert self.job
        ranks = self.job.ranks
        return ranks, set().union(*(children(pid) for pid in ranks.values()))

    @property
    def training(self) -> bool:
        """Whether these processes have written a figure or a checkpoint."""
        return any(changed_s(path) > self.since for path in (self.folder / "metrics.jsonl", *self.saved("step_*.pt")))

    @property
    def step(self) -> int:
        """The last step that is written down in any way."""
        return max([last_figures(self.folder)[0], *saved_steps(self.folder)])

    def saved(self, pattern: str) -> list[Path]:
        return list((self.folder / "checkpoints").glob(pattern))

    @property
    def torn(self) -> list[Path]:
        """What these processes are writing, or were when they were killed."""
        return [path for path in self.saved("*.tmp") if changed_s(path) > self.since]

    def phase(self) -> str:
        """What the job seems to be doing, by its processes and files."""
        ranks, loading = self.members()
        if not loading:
            return "starting" if ranks else "launching"
        step, evaluated = last_figures(self.folder)
        if step == self.steps and evaluated:
            return "end"
        return "eval" if step and step % self.eval_every == 0 and not evaluated else "step"

    def until(self, condition, what: str, poll_s: float = 0.02) -> bool:
        """Wait until the condition holds; False if the job ended well before. Raises Failed."""
        assert self.job
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            code = self.job.process.poll()
            if code == 0:
                return False
            if code is not None:
                raise Failed(f"the job ended with {code} by itself while {what} was waited for")
            if time.monotonic() > deadline:
                raise Failed(f"no {what} after {PATIENCE_S} s, at step {self.step}")
            time.sleep(poll_s)
        return True

    def await_moment(self, moment: str, aim: int, draw: random.Random) -> bool:
        """Wait for the moment, at or after the step aimed at; False if the job has ended well before it."""
        self.scan = None
        if moment == "start-up":
            at = self.since + draw.uniform(0, self.start_s)
            return self.until(lambda: time.time() >= at, "the time")
        if not self.until(lambda: self.training, "training"):
            return False
        if not self.trained:
            self.trained, self.start_s = True, time.time() - self.since
            if self.struck:
                self.struck.recovered_s = time.time() - self.struck_at
        if not self.until(lambda: self.step >= aim, f"step {aim}"):
            return False
        if moment in ("save", "eval"):
            self.scan = self.members(), self.ours()  # it takes longer than a save
        if moment == "save":
            return self.until(lambda: self.torn, "save", poll_s=0.001)
        if moment == "eval":
            return self.until(lambda: evaluating(self.folder, self.eval_every), "evaluation", poll_s=0.002)
        at = time.time() + draw.uniform(0, 3.0 if moment == "end" else 0.7)
        return self.until(lambda: time.time() >= at, "the time", poll_s=0.005)

    def strike(self, draw: random.Random) -> Blow:
        """Strike a process at random, now: the blow, once what must come of it has come. Raises Failed."""
        assert self.job
        saving = self.torn
        (ranks, loading), everyone = self.scan or (self.members(), self.ours())
        phase = "save" if saving else "eval" if self.scan and evaluating(self.folder, self.eval_every) else self.phase()
        possible = [v for v in VICTIMS if v.startswith("launcher") or ("loading" in v and loading) or len(ranks) == 2]
        possible = [v for v in possible if loading or "loading" not in v]
        victim = draw.choices(possible, [VICTIMS[v] for v in possible])[0]
        blow = Blow(phase, victim, self.step)
        before = everyone - {self.job.process.pid}
        self.struck, self.struck_at = blow, time.time()
        if victim == "launcher":
            kill(self.job.process.pid)
        elif victim.startswith("launcher"):
            kill(self.job.process.pid, signal.SIGTERM)
            if victim.endswith("SIGKILL"):
                time.sleep(draw.uniform(0, 1.0))
                kill(self.job.process.pid)
        elif victim == "loading process":
            kill(draw.choice(sorted(loading)))
        elif victim == "both ranks":
            for pid in ranks.values():
                kill(pid)
        else:
            pid = draw.choice(sorted(ranks.values()))
            if victim.endswith("before"):
                kill(pid, signal.SIGSTOP)
                time.sleep(draw.uniform(0, 1.0))
            kill(pid)
        self.see_through(blow, before)
        return blow

    def see_through(self, blow: Blow, before: set[int]) -> None:
        """Wait until what was struck is gone: the launcher and all it started, or all ranks."""
        assert self.job
        process, deadline = self.job.process, time.monotonic() + PATIENCE_S
        ends = blow.victim.startswith("launcher") or not self.restarts
        while process.poll() is None and (ends or {pid for pid in before if running(pid)}):
            if time.monotonic() > deadline:
                raise Failed(f"still there {PATIENCE_S} s after {blow}: {self.ours()}")
            time.sleep(0.02)
        blow.torn = len(self.torn)
        blow.exit_code = process.poll()
        if blow.exit_code is None:
            self.since, self.trained = time.time(), False
            return
        check_exit(blow, self)
        deadline = time.monotonic() + 60  # ranks that were starting first import torch
        while orphans := self.ours():
            if time.monotonic() > deadline:
                raise Failed(f"left over after {blow}: {sorted(orphans)}")
            time.sleep(0.05)


def check_exit(blow: Blow, life: Life) -> None:
    """Raise Failed unless the launcher ended as it must after the blow."""
    begun, near_end = blow.phase not in ("launching", "starting"), blow.step + life.eval_every >= life.steps
    if blow.victim == "launcher, SIGTERM":
        right = ((0, 75) if near_end else (75,)) if begun else (0, 75, 143, -15)
    elif blow.victim.startswith("launcher"):
        right = (-9, -15, 75, 143, 0)
    else:
        right = (0, 1) if blow.phase == "end" else (1,)
        if life.restarts and blow.exit_code:
            raise Failed(f"the launcher was to start the ranks again: {blow}")
    if blow.exit_code not in right:
        raise Failed(f"ended with {blow.exit_code}, wanted one of {right}: {blow}")
    if blow.exit_code == 75 and max(saved_steps(life.folder), default=0) < blow.step:
        raise Failed(f"exit code 75, but the last checkpoint is of {saved_steps(life.folder)}: {blow}")


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def changed_s(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def last_figures(folder: Path) -> tuple[int, bool]:
    """The step of the last whole line of metrics.jsonl, and whether it is of an evaluation; 0 if there is none."""
    with suppress(OSError), (folder / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 40_000))
        lines = file.read().split(b"\n")[:-1]
        if lines and lines[-1].startswith(b'{"step": '):
            return int(lines[-1][9:].split(b",")[0]), b'"eval/' in lines[-1]
    return 0, False


def evaluating(folder: Path, every: int) -> bool:
    step, evaluated = last_figures(folder)
    return step > 0 and step % every == 0 and not evaluated
