"""A soak: a run is killed at random moments, again and again, and must come to what an undisturbed one comes to.

    python -m benchmarks.soak --kills 200 --seed 0
    python -m benchmarks.soak --restarts 20 --door torchrun

The run: digits on two ranks, with all that has a state: drift, EMA, mixup, loading processes, accumulation, evaluation.
It is struck at random (benchmarks/kills.py) and goes on by launch.max_restarts, or as the same command is given again.
At the end all of it is compared, bit for bit but for times: the last checkpoint, metrics.jsonl, result.json, the files;
and nothing may be left over: no process, no half-written file, nothing in /dev/shm, nothing in the folder for temporary
files. Should it end before all blows have fallen, it begins anew with the rest. What fails stays in the folder, to be
looked at, and the exit code is 1.

With --restarts: so many times a run of which a random rank is killed once, after its first step, and which must go on
by itself, by launch.max_restarts=1 or torchrun --max-restarts=1.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from benchmarks.kills import MOMENTS, Blow, Failed, Life, kill
from benchmarks.timing import machine, stolen
from tests.launch.jobs import PYTHON, TORCHRUN, differing, figures, saved_steps, state

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
    found = [f"state{path}" for path in differing(state(one), state(other))]
    found += [f"metrics.jsonl{path}" for path in differing(figures(one), figures(other))]
    if result(one) != result(other):
        found.append("result.json")
    for pointer in "latest", "best":
        if (one / "checkpoints" / pointer).read_text() != (other / "checkpoints" / pointer).read_text():
            found.append(pointer)
    if names(one) != names(other):
        found.append(f"files: {sorted(names(one) ^ names(other))}")
    if len(saved_steps(other)) > KEEP + 1:
        found.append(f"{len(saved_steps(other))} checkpoints, wanted at most {KEEP + 1}")
    return found


def names(folder: Path) -> set[str]:
    """All files but checkpoints, which a preemption adds, and W&B's, which each process has its own of."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if "wandb" not in path.parts}
    return {name for name in found if not (name.startswith("checkpoints/step_") and name.endswith(".pt"))}


def result(folder: Path) -> dict[str, object]:
    return {k: v for k, v in json.loads((folder / "result.json").read_text()).items() if k != "duration_s"}


def shared_memory_of_the_dead(before: set[str]) -> list[str]:
    """What torch has put into /dev/shm since then and whose process is gone: torch_<pid>_..."""
    found = [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("torch_")]
    return [name for name in found if not Path(f"/proc/{name.split('_')[1]}").exists()]


def table(blows: list[Blow]) -> str:
    """What was struck, doing what."""
    phases = ["launching", "starting", "step", "save", "eval", "end"]
    counts = Counter((blow.victim, blow.phase) for blow in blows)
    victims = sorted({blow.victim for blow in blows})
    rows = [[name, *(counts[name, phase] for phase in phases)] for name in victims]
    rows.append(["all", *(sum(counts[name, phase] for name in victims) for phase in phases)])
    lines = [f"{'killed':<32}" + "".join(f"{phase:>11}" for phase in [*phases, "all"])]
    lines += [f"{row[0]:<32}" + "".join(f"{cell:>11}" for cell in [*row[1:], sum(row[1:])]) for row in rows]
    recovered = [blow.recovered_s for blow in blows if blow.recovered_s is not None]
    lines.append(spread(recovered, "until it trained again, where no blow came before that"))
    ended = sum(blow.exit_code is not None for blow in blows)
    preempted = sum(blow.exit_code == 75 for blow in blows)
    lines.append(f"the command given again {ended} times, {preempted} of them after exit code 75")
    lines.append(f"ranks started again by launch.max_restarts {len(blows) - ended} times")
    lines.append(f"half-written files left by a blow, and gone at the end: {sum(blow.torn for blow in blows)}")
    return "\n".join(lines)


def spread(seconds: list[float], what: str) -> str:
    if len(seconds) < 2:
        return f"s {what}: {seconds}"
    low, middle, high = statistics.quantiles(seconds, n=4)
    return f"s {what}: {middle:.1f} (quartiles {low:.1f} to {high:.1f}, n = {len(seconds)}, most {max(seconds):.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--restarts", type=int, help="instead of the soak: kill a rank in so many runs")
    parser.add_argument("--door", choices=DOORS, default="python", help="of --restarts")
    parser.add_argument("--seed", type=int, default=0, help="of the blows")
    parser.add_argument("--steps", type=int, help="of the run; none: 2 for each kill, or 12 with --restarts")
    parser.add_argument("--minutes", type=float, default=1e9, help="no blow later than that; the run is let end")
    parser.add_argument("--wandb", choices=["disabled", "offline"], default="disabled")
    parser.add_argument("--folder", type=Path, help="where all of it goes; none: a new one, removed if all went well")
    parser.add_argument("--json", type=Path, help="write all blows to it")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    steps = options.steps or (12 if options.restarts else max(20, 2 * options.kills))
    soak = Soak(
        folder, steps=steps, seed=options.seed, door=options.door if options.restarts else "python", wandb=options.wandb
    )
    print(machine(), f"Python {sys.version.split()[0]}", sep=", ", flush=True)
    began, ticks, failure = time.time(), stolen(), ""
    try:
        soak.undisturbed()
        print(f"undisturbed: {time.time() - began:.0f} s, trains after {soak.start_s:.1f} s", flush=True)
        if options.restarts:
            recovered = [again(soak, number) for number in range(options.restarts)]
            print(spread(recovered, f"until it trained again: {len(recovered)} of {options.restarts} recovered"))
        else:
            soak.killed(options.kills, options.minutes)
    except (Failed, AssertionError, OSError) as error:
        failure = f"{type(error).__name__}: {error}"
    if soak.blows:
        print(table(soak.blows))
    load = os.getloadavg()[2]
    print(f"{time.time() - began:.0f} s in all; steal {stolen(ticks):.0%}, load average of the last 15 min {load:.1f}")
    if options.json:
        options.json.write_text(json.dumps({"failure": failure, "blows": [asdict(blow) for blow in soak.blows]}))
    if failure:
        print(f"FAILED: {failure}\nall of it stays in {folder}")
        return 1
    if not options.folder:
        shutil.rmtree(folder)
    print(f"{len(soak.blows)} kills, {soak.lives - 1} runs: all as undisturbed, nothing left over")
    return 0


def again(soak: Soak, number: int) -> float:
    recovered_s = soak.restarted()
    print(f"{number + 1}: {recovered_s:.1f} s", flush=True)
    return recovered_s


if __name__ == "__main__":
    sys.exit(main())
