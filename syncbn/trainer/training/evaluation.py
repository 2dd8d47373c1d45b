"""The figures of a model on the eval data, with running statistics and with recalibrated ones, and what it shows."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from syncbn.trainer.data import Batches, Data
from syncbn.trainer.runs.pictures import Chart, Shown
from syncbn.trainer.tasks import Task
from syncbn.trainer.training import drift
from syncbn.trainer.training.options import TrainConfig
from syncbn.trainer.training.preemption import Preempted, Stop
from syncbn.trainer.training.totals import Gathered, Totals
from syncbn.trainer.world import World


class Evaluation(NamedTuple):
    """What an evaluation comes to: figures by name, and charts."""

    figures: dict[str, float]
    charts: Sequence[Chart]


def evaluate_all(
    model: nn.Module,
    task: Task,
    data: Data,
    config: TrainConfig,
    world: World,
    stop: Stop | None = None,
    *,
    recalibrate: int = 0,
) -> Evaluation:
    """All that an evaluation comes to, with figures after recalibrating from so many training batches. Collective."""
    figures, charts = measure(model, task, data.eval, config, world, stop)
    if recalibrate:
        figures |= evaluate_recalibrated(model, task, data, config, world, stop, recalibrate=recalibrate)
    return Evaluation(figures, charts)


def evaluate(
    model: nn.Module, task: Task, batches: Batches, config: TrainConfig, world: World, stop: Stop | None = None
) -> dict[str, float]:
    """The figures of `measure`. Collective."""
    return measure(model, task, batches, config, world, stop).figures


@torch.no_grad()
def measure(
    model: nn.Module, task: Task, batches: Batches, config: TrainConfig, world: World, stop: Stop | None = None
) -> Evaluation:
    """The metrics and charts over every eval image exactly once, with rank 0's buffers on every rank. Collective.

    No batch is exchanged, only what a task has in rows: ranks may have different numbers of batches, or none. Raises
    Preempted once stop was asked.
    """
    model.eval()
    world.copy_from_rank_0(list(model.buffers()))
    totals, rows = Totals(task.shapes, world), Gathered(task.rows, world)
    batches_left = iter(batches)
    for _ in range(batches.most):
        for batch in islice(batches_left, 1):
            with autocast(config, world):
                measured: Any = task.evaluate(model, batch)
            totals.add(measured, batch.samples, batch.skipped)
            rows.add(batch.places, measured)
        if stop and stop.asked():
            raise Preempted
    reduced = totals.reduce()
    sums = {**reduced.sums, **rows.gather()}
    judged, charts = world.on_rank_0(lambda: (task.figures(sums), task.charts(sums)))  # once, as it may be dear
    figures = {f"eval/{name}": value for name, value in judged.items()}
    figures |= {"eval/images": reduced.images, "eval/skipped_images": reduced.skipped}
    return Evaluation(figures, charts)


def evaluate_recalibrated(
    model: nn.Module,
    task: Task,
    data: Data,
    config: TrainConfig,
    world: World,
    stop: Stop | None = None,
    *,
    recalibrate: int,
) -> dict[str, float]:
    """The metrics with the statistics of training batches in place of the running ones, and what these miss.

    What the metrics differ by, the running statistics cost. Empty, if the model has none that move. Collective.
    """
    recalibrated = drift.recalibrated(model, islice(data.sample, recalibrate), autocast(config, world), task.evaluate)
    if recalibrated is None:
        return {}
    model, gaps = recalibrated
    figures = evaluate(model, task, data.eval, config, world, stop)
    renamed = {name.replace("eval/", "eval/recalibrated_"): value for name, value in figures.items()}
    unneeded = ("eval/recalibrated_images", "eval/recalibrated_skipped_images")
    return {name: value for name, value in renamed.items() if name not in unneeded} | gaps


@torch.no_grad()
def show(model: nn.Module, task: Task, data: Data, config: TrainConfig, world: World, charts: Sequence[Chart]) -> Shown:
    """Charts, and the task's pictures of a few eval samples, the same each time.

    Every rank makes the pictures; none sends anything.
    """
    model.eval()
    for batch in data.shown:
        if batch.samples:
            with autocast(config, world):
                return Shown(task.pictures(model, batch, data.shown.pixels(batch.images)), charts, task.legend)
    return Shown(charts=charts)


def autocast(config: TrainConfig, world: World) -> AbstractContextManager:
    """bf16 or fp16 where that is exact enough, as the config says."""
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(world.device.type, dtype, enabled=config.precision != "fp32")
