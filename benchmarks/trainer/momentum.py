"""What norm.momentum=auto gains: one training, evaluated by two running averages and by exact statistics.

    python -m benchmarks momentum 2 4        images of a norm batch, one rank, digits, resnet8, two epochs, three seeds

Momentum has no part in training, so both averages see the same one: the second is made of the steps of the first.
"""

import argparse
import tempfile
from collections.abc import Iterator
from itertools import islice

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from benchmarks.measure.records import Result
from syncbn.trainer import norms
from syncbn.trainer.config import typed
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.training.evaluation import evaluate, evaluate_all
from syncbn.trainer.training.loop import optimiser_step
from syncbn.trainer.world import World

EPOCHS, SEEDS, OWN = 2, 3, 0.1


def train(batch: int, seed: int) -> Iterator[Result]:
    """At each half epoch accuracy and loss by momentum 0.1, by auto, and by exact statistics."""
    config = typed({"seed": seed, "data": {"batch_per_rank": batch}, "train": {"epochs": EPOCHS}})
    world = World(0, 1, torch.device("cpu"))
    parts = build(config, world)
    training, net = assemble(parts, config, world), parts.model
    place = norms.Place(world.device, images=batch)
    auto = norms.momentum_of(norms.NormConfig(momentum="auto"), place) or 0.0
    buffers = [b for layer in norms.batch_norms(net) for b in (layer.running_mean, layer.running_var)]
    other, batches = [b.clone() for b in buffers], iter(training.data.train)
    half = training.data.steps_per_epoch // 2
    net.train()
    for step in range(1, 2 * EPOCHS * half + 1):
        old = [b.clone() for b in buffers]
        optimiser_step(training, config.train, world, islice(batches, 1))
        training.schedule.step()
        for mine, before, now in zip(other, old, buffers, strict=True):
            mine.lerp_((now - (1 - OWN) * before) / OWN, auto)  # what this batch's statistics were
        if step % half == 0:
            metrics = evaluate_all(net, parts.task, parts.data, config.train, world, recalibrate=64).figures
            kept = [b.clone() for b in buffers]
            copy_all(other, buffers)
            averaged = evaluate(net, parts.task, parts.data.eval, config.train, world)
            copy_all(kept, buffers)
            net.train()
            rows = {"0.1": (metrics, "eval/"), "auto": (averaged, "eval/"), "exact": (metrics, "eval/recalibrated_")}
            for by, (values, prefix) in rows.items():
                case = {"images": batch, "seed": seed, "step": step, "statistics": by}
                figures = {"accuracy, %": 100 * values[prefix + "accuracy"], "loss": values[prefix + "loss"]}
                yield Result("one training", case, figures)


def copy_all(values: list[torch.Tensor], into: list[torch.Tensor]) -> None:
    for value, place in zip(values, into, strict=True):
        place.copy_(value)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=int, nargs="+", help="of a norm batch")


def measure(options: argparse.Namespace) -> Iterator[Result]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        for images in options.images:
            for seed in range(SEEDS):
                yield from train(images, seed)
        dist.destroy_process_group()
