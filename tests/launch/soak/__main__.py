"""A soak: a run is killed at random moments, again and again, and must come to what an undisturbed one comes to.

    python -m tests.launch.soak --kills 200 --seed 0
    python -m tests.launch.soak --restarts 20 --door torchrun

The run (run.py) is struck at random (blows.py) and goes on by launch.max_restarts, or as the same command is given
again. At the end all of it is compared with the undisturbed one; and nothing may be left over: no process, no
half-written file, nothing in /dev/shm, nothing in the folder for temporary files. Should it end before all blows have
fallen, it begins anew with the rest. What fails stays in the folder, to be looked at, and the exit code is 1.

With --restarts: so many times a run of which a random rank is killed once, after its first step, and which must go on
by itself, by launch.max_restarts=1 or torchrun --max-restarts=1.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from tests.launch.soak.blows import Blow, Failed
from tests.launch.soak.run import DOORS, Soak


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
    parser = argparse.ArgumentParser(
        "python -m tests.launch.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    print(machine(), flush=True)
    began, before, failure = time.time(), stolen_ticks(), ""
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
    steal, ticks = (now - then for now, then in zip(stolen_ticks(), before, strict=True))
    print(f"{time.time() - began:.0f} s in all; steal {steal / ticks:.0%}, load average of the last 15 min {load:.1f}")
    if options.json:
        options.json.write_text(json.dumps({"failure": failure, "blows": [asdict(blow) for blow in soak.blows]}))
    if failure:
        print(f"FAILED: {failure}\nall of it stays in {folder}")
        return 1
    if not options.folder:
        shutil.rmtree(folder)
    print(f"{len(soak.blows)} kills, {soak.lives - 1} runs: all as undisturbed, nothing left over")
    return 0


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"


def stolen_ticks() -> tuple[int, int]:
    """(steal, all) ticks since the machine started."""
    ticks = [int(tick) for tick in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return ticks[7], sum(ticks)


def again(soak: Soak, number: int) -> float:
    recovered_s = soak.restarted()
    print(f"{number + 1}: {recovered_s:.1f} s", flush=True)
    return recovered_s


if __name__ == "__main__":
    sys.exit(main())
