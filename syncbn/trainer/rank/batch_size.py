"""The batch that data.batch_per_rank=auto stands for: the largest that a GPU's memory takes, the fastest on a CPU."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch

from syncbn.trainer import data, norms
from syncbn.trainer.config import Config
from syncbn.trainer.errors import UserError
from syncbn.trainer.rank.build import Parts, build
from syncbn.trainer.rank.diagnosis import is_out_of_memory
from syncbn.trainer.training import optim
from syncbn.trainer.training.evaluation import autocast
from syncbn.trainer.training.loop import only
from syncbn.trainer.training.resume import Start
from syncbn.trainer.world import World

SMALLEST = 2  # one image of 1×1 pixels in the last layers has no variance
REPEATS = 3  # steps that are timed, after one that is not
ROOM = 0.9  # of a GPU's memory: what DDP, NCCL and the allocator's gaps take is not in the measurement
WORTH = 1.05  # times the images/s, for twice the batch on a CPU

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Speed:
    """The images of a forward on each rank, and those that all ranks trained in a second with it, but for DDP."""

    batch_per_rank: int
    images_per_s: float

    def __str__(self) -> str:
        return f"{self.batch_per_rank} images a rank, {self.images_per_s:.0f} images/s before gradients are shared"


def settled(config: Config, ranks: World, start: Start | None) -> Config:
    """The config with a number for data.batch_per_rank=auto: that of a start, or one to be probed. Collective."""
    if config.data.batch_per_rank != data.AUTO:
        return config
    batch = -(-start.global_batch // ranks.size) if start and start.global_batch else probed(config, ranks)
    return replace(config, data=replace(config.data, batch_per_rank=batch))


def probed(config: Config, ranks: World) -> int:
    """The images a rank that data.batch_per_rank=auto comes to on these ranks. Collective."""
    alone = replace(
        config,
        data=replace(config.data, batch_per_rank=1),
        norm=norms.of_one_rank(config.norm),
        train=replace(config.train, cuda_graph=False),
    )
    with ranks.together():
        parts = build(alone, ranks)
    best = batch_per_rank(parts, config, ranks)
    if ranks.rank == 0:
        print(f"data.batch_per_rank=auto: {best}", flush=True)
    return best.batch_per_rank


def batch_per_rank(parts: Parts, config: Config, ranks: World, clock: Clock = time.perf_counter) -> Speed:
    """Try 2, 4, 8, ... images a rank in whole steps, until memory is short or, on a CPU, nothing is gained any more.

    Each rank tries by itself, with all others at the same time; what does not fit on one fits on none.

    Args:
        parts: those of this training, but with a norm that sends nothing. They are used up.

    Raises UserError if not even the smallest fits. Collective.
    """
    with ranks.together():
        take_step = stepper(parts, config, ranks)
    images = len(parts.data.train.loader.dataset)  # pyright: ignore[reportArgumentType]
    most = max(SMALLEST, images // (ranks.size * config.train.accumulate))
    best: Speed | None = None
    batch = SMALLEST
    while batch <= most:
        with ranks.together():
            speed = images_per_s(take_step, batch, ranks.device, clock)
        speeds = ranks.everyone(speed)
        if not all(speeds):
            break
        seen = Speed(batch, sum(speeds))
        if best and ranks.device.type != "cuda" and seen.images_per_s < WORTH * best.images_per_s:
            break
        best = seen
        batch *= 2
    if best is None:
        raise UserError(
            f"data.batch_per_rank=auto: not even {SMALLEST} images fit into the memory of each rank: take a smaller "
            "model or data.size, or train.precision=bf16",
            on_every_rank=True,
        )
    return best


def stepper(parts: Parts, config: Config, ranks: World) -> Callable[[int], None]:
    """A function that does a whole step on so many images, which look like those of the data."""
    example = next(batch for batch in parts.data.sample if batch.samples)
    optimizer = optim.build(config.optim, parts.model, images_per_step=1)
    parts.model.train()

    def take_step(batch: int) -> None:
        samples = parts.task.example(example, batch)
        for part, loss_of in parts.task.parts.items():
            with only(parts.model, part), autocast(config.train, ranks):
                loss = loss_of(parts.model, samples)
            (loss.total.sum() * 0).backward()  # whatever the loss, no weight runs away
            optimizer.step()
            optimizer.zero_grad()

    return take_step


def images_per_s(take_step: Callable[[int], None], batch: int, device: torch.device, clock: Clock) -> float:
    """How fast this rank is with such batches; 0 if they do not fit into its memory."""
    try:
        times = [timed(take_step, batch, device, clock) for _ in range(1 + REPEATS)][1:]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        times = []
    fits = bool(times)
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        fits = fits and torch.cuda.max_memory_reserved(device) <= ROOM * total
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return batch / median(times) if fits else 0.0


def timed(take_step: Callable[[int], None], batch: int, device: torch.device, clock: Clock) -> float:
    """Seconds that a step takes."""
    began = clock()
    take_step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began
