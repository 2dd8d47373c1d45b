"""What norm.momentum=auto gains: one training, evaluated by two running averages and by exact statistics.

    python -m benchmarks.momentum 2 4        images of a norm batch, one rank, digits, resnet8, two epochs, three seeds

Momentum has no part in training, so both averages see the same one: the second is made of the steps of the first.
"""

import sys
import tempfile
from itertools import islice

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from syncbn.trainer import norms
from syncbn.trainer.config import typed
from syncbn.trainer.job.build import assemble, build
from syncbn.trainer.training.evaluation import evaluate, evaluate_all
from syncbn.trainer.training.loop import optimiser_step
from syncbn.trainer.world import World

EPOCHS, SEEDS, OWN = 2, 3, 0.1


def measure(batch: int, seed: int) -> None:
    """Train, and print at each half epoch accuracy and loss by momentum 0.1, by auto, and recalibrated."""
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
            found = evaluate_all(net, parts.task, parts.data, config.train, world, recalibrate=64)
            kept = [b.clone() for b in buffers]
            copy_all(other, buffers)
            averaged = evaluate(net, parts.task, parts.data.eval, config.train, world)
            copy_all(kept, buffers)
            net.train()
            told = [(found, "eval/"), (averaged, "eval/"), (found, "eval/recalibrated_")]
            cells = [f"{100 * f[p + 'accuracy']:.2f} % {f[p + 'loss']:.4f}" for f, p in told]
            print(
                f"batch {batch} seed {seed} step {step}: 0.1 {cells[0]} | auto {cells[1]} | exact {cells[2]}",
                flush=True,
            )


def copy_all(values: list[torch.Tensor], into: list[torch.Tensor]) -> None:
    for value, place in zip(values, into, strict=True):
        place.copy_(value)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(f"{tempfile.mkdtemp()}/store", 1), rank=0, world_size=1)
    for images in map(int, sys.argv[1:]):
        for seed in range(SEEDS):
            measure(images, seed)
