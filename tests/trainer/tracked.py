"""A process that tracks a run as rank 0 does, and has something happen to wandb-core on the way.

python -m tests.trainer.tracked FOLDER '{"mode": ..., "timeout_s": ...}' WHAT RUN_ID

RUN_ID may be empty, WHAT is none, SIGKILL, SIGSTOP, SIGSTOP-at-the-end or gone-on (from the middle). Prints what the
training thread saw, as JSON.
"""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from syncbn.trainer.display.wandb_run import Tracker, WandbConfig
from syncbn.trainer.runs.pictures import PNG, Box, Pictures
from syncbn.trainer.tasks import Picture

STEPS = 40
FIGURES = 100
PICTURED = (10, 30)  # steps


def wandb_cores():
    """The pids of this process's wandb-cores, by /proc."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        if name.endswith("(wandb-core") and int(rest.split()[1]) == os.getpid():
            children.append(int(stat.parent.name))
    return children


def main(folder, config, what, run_id, *_):
    config = WandbConfig(**json.loads(config))
    began_at = STEPS // 2 if what == "gone-on" else 0
    tracker = Tracker(
        config,
        Path(folder),
        name="a",
        group="b",
        settings={"seed": 0},
        run_id=run_id or None,
        earlier=((step, figures(step)) for step in range(1, began_at + 1)),
    )
    slowest_s = 0.0

    def timed(call, *arguments):
        nonlocal slowest_s
        began = time.monotonic()
        call(*arguments)
        slowest_s = max(slowest_s, time.monotonic() - began)

    for step in range(began_at + 1, STEPS + 1):
        if step == STEPS // 2:
            wait_for(lambda: tracker.files or tracker.failure)
            if what in ("SIGKILL", "SIGSTOP"):
                send(what)
        timed(tracker.log, step, figures(step))
        if step == 2:
            timed(tracker.alert, "title", "told")
        if step in PICTURED:
            boxes = {"truth": [], "prediction": [Box(0.4, 0.0, 1.9, 3.0, "cat", 0.5), Box(0.0, 0.0, 1.0, 1.0, "ant")]}
            pngs = [PNG(png(step), f"after {step}", ("a", "b")), PNG(png(step, side=2), "", (), boxes)]
            pictures = Pictures(step, pngs, [], {"dog": "#000000"})
            timed(tracker.show, pictures, {"eval/chart": partial(Image.new, "RGB", (2, 2), (step,) * 3)})
        time.sleep(0.02)
    if what == "SIGSTOP":  # noticed in mid-run, before it is finished
        wait_for(lambda: not stopped())
    timed(tracker.keep, {}, {"table": (["layer", "z"], [["bn1", 1.5]])}, {"verdict": "ok"})
    if what == "SIGSTOP-at-the-end":
        send("SIGSTOP")
    began = time.monotonic()
    tracker.finish()
    seen = {
        "slowest_s": slowest_s,
        "finish_s": time.monotonic() - began,
        "failure": tracker.failure,
        "files": str(tracker.files),
        "run_id": tracker.run_id,
        "left_at": time.time(),
    }
    print(json.dumps(seen))


def png(step, side=4):
    """A picture whose grey is the step."""
    return Picture(torch.full((3, side, side), step, dtype=torch.uint8)).png()


def figures(step):
    return {f"train/{i}": float(step) for i in range(FIGURES)}


def stopped():
    return any("\nState:\tT" in Path(f"/proc/{pid}/status").read_text() for pid in wandb_cores())


def send(name):
    (pid,) = wandb_cores()
    os.kill(pid, getattr(signal, name.removesuffix("-at-the-end")))


def wait_for(condition, longest_s=60):
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > longest_s:
            raise TimeoutError
        time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
