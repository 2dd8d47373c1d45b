"""What an evaluation costs: its time over that of the forwards of the same images.

    python -m benchmarks evaluation RUN
    torchrun --nproc-per-node 2 -m benchmarks evaluation RUN

RUN is the folder of a run, whose latest checkpoint is evaluated as in training: images, forwards, rows of all ranks,
figures and charts. In turn, each rank takes its images through the model alone, from memory. With data.cache=true only
the first evaluation, which is not measured, reads files.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import timing
from benchmarks.measure.records import Result
from syncbn.trainer import world
from syncbn.trainer.config import typed
from syncbn.trainer.rank.build import build
from syncbn.trainer.training import evaluation, resume
from syncbn.trainer.training.state import best_weights


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--turns", type=int, default=11)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    _, state = resume.load_checkpoint(options.run)
    config: Any = typed(state["config"])
    config = replace(config, data=replace(config.data, cache=True))
    ranks = world.join(config.launch, world.meet())
    parts = build(config, ranks, load=False)
    parts.model.load_state_dict(best_weights(state))
    parts.model.eval()
    batches = [batch.images for batch in parts.data.eval]

    def forwards() -> None:
        with torch.no_grad(), evaluation.autocast(config.train, ranks):
            for images in batches:
                parts.model(images)
        ranks.everyone(None)

    def evaluated() -> None:
        evaluation.measure(parts.model, parts.task, parts.data.eval, config.train, ranks)

    times = timing.turns({"forwards": forwards, "evaluation": evaluated}, 0, least=options.turns)
    title = f"{config.model.name}, {parts.data.fingerprint['eval']} images"
    for name, figures in timing.compared(times, "forwards"):
        yield Result(title, {"ranks": ranks.size, "what": name}, figures)
