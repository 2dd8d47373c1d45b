"""The training loop. It takes built objects and knows neither files nor configs of others."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import syncbn
from syncbn import Reading
from syncbn.trainer import drift
from syncbn.trainer.average import Average
from syncbn.trainer.data import Batch, Batches, Data
from syncbn.trainer.errors import UserError
from syncbn.trainer.graph import Capture, Captured, Done, Step, cuda_graph
from syncbn.trainer.metrics import Totals
from syncbn.trainer.tasks import Task
from syncbn.trainer.world import World


@dataclass
class TrainConfig:
    epochs: float = 10.0  # passes over the training images ...
    steps: int | None = None  # ... or, if given, optimiser steps
    accumulate: int = 1  # forwards and backwards per optimiser step; the batch of a norm stays that of one forward
    precision: str = "fp32"  # fp32, or bf16 (autocast: parameters and statistics stay fp32)
    channels_last: bool = False  # memory format of images and convolutions
    compile: bool = False  # torch.compile, the whole model in one graph
    cuda_graph: bool = False  # GPUs only: each step after the 11th is one CUDA graph, launched at once
    ema: float = 0.0  # decay per step of an average of all weights and buffers, used in eval; 0: none
    clip_norm: float = 0.0  # largest norm of the gradient; 0: any
    log_every: int = 10  # steps
    eval_every: int | None = None  # steps; none: each epoch. A checkpoint is written at each eval

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"train.precision={self.precision}: choose one of fp32, bf16")
        if not self.epochs > 0:
            raise UserError(f"train.epochs={self.epochs}: give more than 0")
        for name in "steps", "accumulate", "log_every", "eval_every":
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name}={value}: give 1 or more")
        if not 0 <= self.ema < 1:
            raise UserError(f"train.ema={self.ema}: give a decay from 0 up to 1, such as 0.999")
        if self.clip_norm < 0:
            raise UserError(f"train.clip_norm={self.clip_norm}: give 0 (off) or more")

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.steps or max(1, round(self.epochs * steps_per_epoch))


@dataclass
class Training:
    """The objects that train, and how far they have come."""

    model: DistributedDataParallel
    task: Task
    data: Data
    optimizer: Optimizer
    schedule: LRScheduler
    average: Average | None = None
    drift: syncbn.DriftMonitor | None = None
    recalibrate: int = 0  # training batches to recalibrate from at each evaluation
    step: int = 0

    @property
    def epoch(self) -> float:
        return self.step / self.data.steps_per_epoch

    @property
    def best_model(self) -> nn.Module:
        """The model to evaluate and to keep: the average, if there is one."""
        return self.average.module if self.average else self.model.module


class Observer(Protocol):
    """Whoever watches a training, on rank 0."""

    def stepped(self, step: int) -> None: ...
    def log(self, step: int, figures: dict[str, float], reading: Reading | None = None) -> None: ...
    def save(self, training: Training) -> None: ...


class NonFiniteLoss(UserError):
    """The loss of a step was nan or inf on some rank; all ranks raise it after the same step."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the loss is {loss} at step {step}", on_every_rank=True)
        self.step = step


def fit(
    training: Training,
    config: TrainConfig,
    world: World,
    observer: Observer | None = None,
    capture: Capture = cuda_graph,
) -> dict[str, float]:
    """Train to the end, evaluating and saving on the way; the figures of the last evaluation.

    Collective: every rank calls it with the same config; only rank 0 needs an observer.
    """
    task = training.task
    take_step: Step = partial(optimiser_step, training, config, world)
    if config.cuda_graph:
        take_step = Captured(take_step, training.optimizer, capture)
    steps = config.total_steps(training.data.steps_per_epoch)
    eval_every = config.eval_every or training.data.steps_per_epoch
    batches = Waited(training.data.train)
    totals = Totals(task.sums(), world)
    figures: dict[str, float] = {}
    training.model.train()
    while training.step < steps:
        loss, parts = take_step(islice(batches, config.accumulate))
        for sums, skipped in parts:
            totals.add(sums, skipped)
        totals.add_step(loss)
        training.schedule.step()
        training.step += 1

        evaluating = training.step % eval_every == 0 or training.step == steps
        if evaluating or training.step % config.log_every == 0:
            trained = read(totals, training, batches)
            reading = training.drift.read() if training.drift else None
            if observer:
                observer.log(training.step, trained, reading)
        if evaluating:
            figures = evaluate(training.best_model, task, training.data.eval, config, world)
            if training.recalibrate:
                figures |= evaluate_recalibrated(training, config, world)
            if observer:
                observer.log(training.step, {"epoch": training.epoch, **figures})
                observer.save(training)
            training.model.train()
            batches.restart_clock()
        if observer:
            observer.stepped(training.step)
    return figures


def optimiser_step(training: Training, config: TrainConfig, world: World, batches: Iterable[Batch]) -> Done:
    """One step on config.accumulate batches of this rank, a forward and a backward each. Collective.

    It reads nothing back from the device and keeps no number of its own, so that it can be captured as a CUDA graph.
    """
    model, optimizer = training.model, training.optimizer
    loss, parts = torch.zeros((), device=world.device), []
    for micro, batch in enumerate(batches, start=1):
        with model.no_sync() if micro < config.accumulate else nullcontext():
            with autocast(config, world):
                share, sums = training.task.loss(model, batch)
            (share / config.accumulate).backward()
        loss += share.detach() / config.accumulate
        parts.append((sums, batch.skipped))
    if config.clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    if training.average:
        training.average.update_parameters(model.module)
    return loss, parts


def read(totals: Totals, training: Training, batches: "Waited") -> dict[str, float]:
    """The figures since the last reading. Collective. Raises NonFiniteLoss, on every rank, before anything is saved."""
    sums, losses = totals.reduce()
    for step, loss in enumerate(losses, start=training.step - len(losses) + 1):
        if not math.isfinite(loss):
            raise NonFiniteLoss(step, loss)
    elapsed_s, waited_s = batches.restart_clock()
    figures = {f"train/{name}": value for name, value in training.task.metrics(sums).items()}
    return {
        "epoch": training.epoch,
        **figures,
        "train/lr": training.optimizer.param_groups[0]["lr"],
        "train/images_per_s": sums["samples"] / elapsed_s,
        "train/step_ms": 1000 * elapsed_s / len(losses),
        "train/data_wait_share": waited_s / elapsed_s,
        "train/skipped_images": sums["skipped"],
    }


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batches: Batches, config: TrainConfig, world: World) -> dict[str, float]:
    """The metrics over every eval image exactly once, with rank 0's buffers on every rank. Collective.

    No batch is exchanged: ranks may have different numbers of them, or none.
    """
    model.eval()
    world.copy_from_rank_0(list(model.buffers()))
    totals = Totals(task.sums(), world)
    for batch in batches:
        with autocast(config, world):
            sums = task.evaluate(model, batch)
        totals.add(sums, batch.skipped)
    sums, _ = totals.reduce()
    figures = {f"eval/{name}": value for name, value in task.metrics(sums).items()}
    return {**figures, "eval/images": sums["samples"], "eval/skipped_images": sums["skipped"]}


def evaluate_recalibrated(training: Training, config: TrainConfig, world: World) -> dict[str, float]:
    """The metrics with the statistics of training batches in place of the running ones, and what these miss.

    What the metrics differ by, the running statistics cost. Collective.
    """
    batches = islice(training.data.sample, training.recalibrate)
    model, gaps = drift.recalibrated(training.best_model, batches, autocast(config, world))
    figures = evaluate(model, training.task, training.data.eval, config, world)
    renamed = {name.replace("eval/", "eval/recalibrated_"): value for name, value in figures.items()}
    unneeded = ("eval/recalibrated_images", "eval/recalibrated_skipped_images")
    return {name: value for name, value in renamed.items() if name not in unneeded} | gaps


def autocast(config: TrainConfig, world: World) -> AbstractContextManager:
    return torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16")


class Waited:
    """An iterator over training batches that knows how long it was waited for."""

    def __init__(self, batches: Batches):
        self.batches: Iterator[Batch] = iter(batches)
        self.began, self.waited_s = time.perf_counter(), 0.0

    def __iter__(self) -> "Waited":
        return self

    def __next__(self) -> Batch:
        asked = time.perf_counter()
        batch = next(self.batches)
        self.waited_s += time.perf_counter() - asked
        return batch

    def restart_clock(self) -> tuple[float, float]:
        """Seconds since the last restart, and how many of them went by in waiting."""
        now = time.perf_counter()
        times = now - self.began, self.waited_s
        self.began, self.waited_s = now, 0.0
        return times
