"""An undisturbed run, and runs that are struck at random and must come to the same, bit for bit but for times.

The run: digits on two ranks, with all that has a state: drift, EMA, mixup, loading processes, accumulation, evaluation.
What is compared: the last checkpoint, metrics.jsonl, result.json, the files; and nothing may be left over.
"""

import json
import os
import random
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.launch.jobs import PYTHON, TORCHRUN, differing, figures, saved_steps, state
from tests.launch.soak.blows import MOMENTS, Blow, Failed, Life, kill

EVAL_EVERY = 10  # steps
KEEP = 2
RUN = [
    "run.name=r",
    f"train.eval_every={EVAL_EVERY}",
    "train.log_every=3",  # not the checkpoints' rhythm: sums are carried over
    "train.accumulate=2",
    "train.ema=0.9",
    "data.workers=1",
    "data.augment.mixup=0.2",
    "checkpoint.every=2",
    f"checkpoint.keep={KEEP}",
]
DOORS = {
    "python": [*PYTHON, "launch.nproc=2"],
    "torchrun": [*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1", "train.py"],
}


class Soak:
    """An undisturbed run, and others of the same config that must come to the same."""

    def __init__(self, folder: Path, *, steps: int, seed: int, door: str = "python", wandb: str = "disabled"):
        self.folder, self.steps, self.draw = folder, steps, random.Random(seed)
        self.command = [*DOORS[door], *RUN, f"train.steps={steps}", f"wandb.mode={wandb}"]
        self.door, self.start_s, self.lives = door, 0.0, 0
        self.blows: list[Blow] = []

    def undisturbed(self) -> None:
        """Run it once in peace, and see how long it takes to start."""
        with self.life("undisturbed") as life:
            life.start(restarts=0)
            life.until(lambda: life.training, "training")
            self.start_s = time.time() - life.since
            self.see_end(life)
        self.whole, self.usual = life.folder, temporary(life)

    def killed(self, kills: int, minutes: float = 1e9) -> None:
        """Strike a run so often, or for so long, let it end, and compare. Raises Failed."""
        until = time.monotonic() + 60 * minutes
        left = kills
        while left and time.monotonic() < until:
            with self.life(f"killed{self.lives}") as life:
                left -= self.struck(life, left, until)
                self.see_end(life)
                self.compare(life)
            shutil.rmtree(life.root)

    def struck(self, life: Life, kills: int, until: float) -> int:
        """Strike a life, the aims spread over its steps: how often it was struck before it ended."""
        life.start(self.draw.choice([0, 1000]))
        at_end = max(1, kills // 20)
        for number in range(kills):
            if time.monotonic() > until:
                return number
            last = number >= kills - at_end
            moments = {"start-up": 1, "end": 2} if last else MOMENTS
            (moment,) = self.draw.choices(list(moments), list(moments.values()))
            aim = self.steps if moment == "end" else self.steps * number // kills
            if not life.await_moment(moment, aim, self.draw):
                return number
            self.blows.append(blow := life.strike(self.draw))
            print(f"{len(self.blows):4} {moment:<8} {blow}", flush=True)
            if blow.exit_code == 0:
                return number + 1
            if blow.exit_code is not None:
                life.start(self.draw.choice([0, 1000]))
        return kills

    def restarted(self) -> float:
        """Kill a random rank of a run once it trains: seconds until it trains again. Raises Failed."""
        with self.life(f"restarted{self.lives}") as life:
            life.start(restarts=1)
            if not life.await_moment("step", 1, self.draw):
                raise Failed("the run ended before it could be struck")
            ranks, loading = life.members()
            before, struck_at = loading | set(ranks.values()), time.time()
            kill(self.draw.choice(sorted(ranks.values())))
            life.until(lambda: not before & life.ours(), "end of all ranks")
            life.since = time.time()
            life.until(lambda: life.training, "training")
            recovered_s = time.time() - struck_at
            self.see_end(life)
            self.compare(life)
        shutil.rmtree(life.root)
        return recovered_s

    @contextmanager
    def life(self, name: str) -> Iterator[Life]:
        """A run in a folder of its own, of which no process is left running, whatever happens."""
        self.lives += 1
        arguments = {"steps": self.steps, "eval_every": EVAL_EVERY, "start_s": self.start_s}
        # torchrun has a number of restarts of its own, and must have this; `python train.py` sets it by itself
        if self.door == "torchrun":
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        self.shared_before = set(os.listdir("/dev/shm"))
        life = Life(self.command, self.folder / name, mark=uuid.uuid4().hex, **arguments)
        try:
            yield life
        finally:
            for pid in life.ours():
                kill(pid)

    def see_end(self, life: Life) -> None:
        """Wait until the run has ended well. Raises Failed."""
        life.until(lambda: False, "end", poll_s=0.1)

    def compare(self, life: Life) -> None:
        """Raise Failed if the run came to anything else than the undisturbed one, or left anything behind."""
        wrong = differences(self.whole, life.folder)
        if left := life.ours():
            wrong.append(f"processes left: {sorted(left)}")
        if left := temporary(life) - self.usual:
            wrong.append(f"left in the folder for temporary files: {left}")
        if left := shared_memory_of_the_dead(self.shared_before):
            wrong.append(f"left in /dev/shm: {left}")
        if wrong:
            raise Failed("; ".join(wrong))


def temporary(life: Life) -> set[str]:
    return {path.name for path in life.temporary.iterdir()}


def differences(one: Path, other: Path) -> list[str]:
    """In what two runs' folders differ that should be the same."""
    parts = [f"state{path}" for path in differing(state(one), state(other))]
    parts += [f"metrics.jsonl{path}" for path in differing(figures(one), figures(other))]
    if result(one) != result(other):
        parts.append("result.json")
    for pointer in "latest", "best":
        if (one / "checkpoints" / pointer).read_text() != (other / "checkpoints" / pointer).read_text():
            parts.append(pointer)
    if names(one) != names(other):
        parts.append(f"files: {sorted(names(one) ^ names(other))}")
    if len(saved_steps(other)) > KEEP + 1:
        parts.append(f"{len(saved_steps(other))} checkpoints, wanted at most {KEEP + 1}")
    return parts


def names(folder: Path) -> set[str]:
    """All files but checkpoints, which a preemption adds, and W&B's, which each process has its own of."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if "wandb" not in path.parts}
    return {name for name in files if not (name.startswith("checkpoints/step_") and name.endswith(".pt"))}


def result(folder: Path) -> dict[str, object]:
    return {k: v for k, v in json.loads((folder / "result.json").read_text()).items() if k != "duration_s"}


def shared_memory_of_the_dead(before: set[str]) -> list[str]:
    """What torch has put into /dev/shm since then and whose process is gone: torch_<pid>_..."""
    added = [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("torch_")]
    return [name for name in added if not Path(f"/proc/{name.split('_')[1]}").exists()]
