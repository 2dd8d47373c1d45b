"""The training loop. It takes built objects and knows neither files nor configs of others."""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol

import torch
from torch import nn

from syncbn import Reading
from syncbn.trainer.data import Batch, Batches, Data
from syncbn.trainer.errors import UserError
from syncbn.trainer.tasks import Task
from syncbn.trainer.training import drift
from syncbn.trainer.training.cuda_graph import Capture, Captured, Done, Step, cuda_graph
from syncbn.trainer.training.preemption import Preempted, Stop
from syncbn.trainer.training.state import Training
from syncbn.trainer.training.totals import Totals
from syncbn.trainer.world import World


@dataclass
class TrainConfig:
    epochs: float = 10.0  # passes over the training images ...
    steps: int | None = None  # ... or, if given, optimiser steps
    accumulate: int = 1  # forwards and backwards per optimiser step; the batch of a norm stays that of one forward
    precision: str = "fp32"  # fp32, or bf16 or fp16 (autocast: parameters and statistics stay fp32)
    channels_last: bool = False  # memory format of images and convolutions
    compile: bool = False  # torch.compile, the whole model in one graph
    cuda_graph: bool = False  # GPUs only: each step after the 11th is one CUDA graph, launched at once
    find_unused_parameters: bool = False  # for a model that leaves some out in some steps; it costs each step time
    ema: float = 0.0  # decay per step of an average of all weights and buffers, used in eval; 0: none
    clip_norm: float = 0.0  # largest norm of the gradient; 0: any
    max_bad_steps: int = 10  # a step whose loss or gradient is not finite is left out; more in a row end the run
    log_every: int = 10  # steps
    eval_every: int | None = None  # steps; none: each epoch. A checkpoint is written at each eval

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise UserError(f"train.precision={self.precision}: choose one of fp32, bf16, fp16")
        if not self.epochs > 0:
            raise UserError(f"train.epochs={self.epochs}: give more than 0")
        for name in "steps", "accumulate", "log_every", "eval_every":
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name}={value}: give 1 or more")
        if self.cuda_graph and self.find_unused_parameters:
            raise UserError(
                "train.cuda_graph=true with train.find_unused_parameters=true: a graph does the same in each step, and "
                "cannot look for what was left out; choose one of the two"
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"train.ema={self.ema}: give a decay from 0 up to 1, such as 0.999")
        if self.max_bad_steps < 0:
            raise UserError(f"train.max_bad_steps={self.max_bad_steps}: give 0 (the first ends the run) or more")
        if self.clip_norm < 0:
            raise UserError(f"train.clip_norm={self.clip_norm}: give 0 (off) or more")

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.steps or max(1, round(self.epochs * steps_per_epoch))


@dataclass
class EvalConfig:
    recalibrate: int = 0  # training batches per rank whose exact statistics each eval is also done with (PreciseBN)

    def __post_init__(self) -> None:
        if self.recalibrate < 0:
            raise UserError(f"eval.recalibrate={self.recalibrate}: give 0 (off) or more batches")


class Observer(Protocol):
    """Whoever watches a training, on rank 0."""

    def stepped(self, step: int) -> None: ...
    def evaluating(self, step: int) -> None: ...
    def log(self, step: int, figures: dict[str, float], reading: Reading | None = None) -> None: ...


class Keeper(Protocol):
    """Whoever saves a training. Collective: every rank has one, and calls it at the same steps."""

    def save(self, training: Training, *, best: bool = False) -> None: ...


class BadSteps(UserError):
    """Too many steps in a row were bad; all ranks raise it after the same step."""

    def __init__(self, first: int, last: int):
        super().__init__(f"the loss or the gradient is not finite from step {first} to step {last}", on_every_rank=True)


def fit(
    training: Training,
    config: TrainConfig,
    world: World,
    observer: Observer | None = None,
    keeper: Keeper | None = None,
    *,
    save_every: int | None = None,
    drift_every: int = 1,
    stop: Stop | None = None,
    capture: Capture = cuda_graph,
) -> dict[str, float]:
    """Train to the end, from wherever the training is, evaluating on the way; the figures of the last evaluation.

    drift_every: steps from one reading of training.drift to the next, at a log step; each evaluation has one too.
    Raises Preempted once stop has been asked, and BadSteps after config.max_bad_steps in a row.

    Collective: every rank calls it with the same arguments, but only rank 0 needs an observer.
    """
    take_step: Step = partial(optimiser_step, training, config, world)
    if config.cuda_graph:
        take_step = Captured(take_step, training.optimizer, capture)
    steps = config.total_steps(training.data.steps_per_epoch)
    eval_every = config.eval_every or training.data.steps_per_epoch
    batches = Waited(training.data.train, training)
    stop = stop or Stop(world)
    training.model.train()
    try:
        while True:
            at_end = training.step >= steps
            if training.evaluated < training.step and (at_end or training.step % eval_every == 0):
                finish_evaluation(training, config, world, observer, keeper, stop)
                batches.restart_clock()
            if at_end:
                return training.figures
            bad, parts = take_step(islice(batches, config.accumulate))
            for sums, skipped in parts:
                training.totals.add(sums, skipped, bad)
            training.totals.add_step(bad)
            training.schedule.step()
            training.step += 1

            at_end = training.step >= steps
            evaluating = at_end or training.step % eval_every == 0
            if evaluating or training.step % config.log_every == 0:
                trained = read(training, config, batches)
                due = evaluating or training.step % drift_every < config.log_every
                reading = training.drift.read() if training.drift and due else None
                if observer:
                    observer.log(training.step, trained, reading)
            if save_every and training.step % save_every == 0 and not evaluating:
                save(training, keeper)
            if observer:
                observer.stepped(training.step)
            if stop.asked():
                raise Preempted
    except Preempted:
        save(training, keeper)
        raise


def settle_buckets(training: Training, config: TrainConfig, world: World) -> None:
    """Have DDP order its buckets as it does in its first step, for a training that is past it. Collective.

    All of DDP's steps but the first add up gradients in buckets in the order of that one's backward, and a ring of more
    than two ranks adds up in an order that depends on the place. The pass leaves traces, which a state then overwrites.
    """
    for batch in islice(training.data.sample, 1):
        with autocast(config, world):
            loss, _ = training.task.loss(training.model, batch)
        loss.backward()
    training.optimizer.zero_grad()


def optimiser_step(training: Training, config: TrainConfig, world: World, batches: Iterable[Batch]) -> Done:
    """One step on config.accumulate batches of this rank, a forward and a backward each. Collective.

    It reads nothing back from the device and keeps no number of its own, so that it can be captured as a CUDA graph.
    """
    model, guard, parts = training.model, training.guard, []
    for micro, batch in enumerate(batches, start=1):
        with model.no_sync() if micro < config.accumulate else nullcontext():
            with autocast(config, world):
                loss, sums = training.task.loss(model, batch)
            guard.backward(loss, weight=training.data.share / config.accumulate)
        parts.append((sums, batch.skipped))
    bad = guard.step(config.clip_norm)
    training.optimizer.zero_grad()
    if training.average:
        training.average.update_parameters(model.module)
    return bad, parts


def read(training: Training, config: TrainConfig, batches: "Waited") -> dict[str, float]:
    """The figures since the last reading, the task's if a step of it was good. Collective.

    Raises BadSteps, on every rank.
    """
    sums = training.totals.reduce()
    in_a_row = int(training.guard.in_a_row)
    if in_a_row > config.max_bad_steps:
        raise BadSteps(training.step - in_a_row + 1, training.step)
    elapsed_s, waited_s = batches.restart_clock()
    images = sums["steps"] * config.accumulate * training.data.global_batch - sums["skipped"]
    learnt = training.task.metrics(sums) if sums["bad_steps"] < sums["steps"] else {}
    figures = {f"train/{name}": value for name, value in learnt.items()}
    return {
        "epoch": training.epoch,
        **figures,
        "train/lr": training.optimizer.param_groups[0]["lr"],
        "train/images_per_s": images / elapsed_s,
        "train/step_ms": 1000 * elapsed_s / sums["steps"],
        "train/data_wait_share": waited_s / elapsed_s,
        "train/skipped_images": sums["skipped"],
        "train/bad_steps": sums["bad_steps"],
    }


def save(training: Training, keeper: Keeper | None, *, best: bool = False) -> None:
    """Save, unless the last step was a bad one: a state to go back to is one from before. Collective."""
    if keeper and not int(training.guard.in_a_row):
        keeper.save(training, best=best)


def finish_evaluation(
    training: Training,
    config: TrainConfig,
    world: World,
    observer: Observer | None,
    keeper: Keeper | None,
    stop: Stop,
) -> None:
    """Evaluate, log and save. Collective. Raises Preempted if stop was asked meanwhile."""
    task = training.task
    if observer:
        observer.evaluating(training.step)
    try:
        figures = evaluate_all(
            training.best_model, task, training.data, config, world, stop, recalibrate=training.recalibrate
        )
    finally:
        training.model.train()
    training.figures, training.evaluated = figures, training.step
    objective = figures[f"eval/{task.objective}"]
    best = training.best is None or objective > training.best
    training.best = objective if best else training.best
    if observer:
        observer.log(training.step, {"epoch": training.epoch, **figures})
    save(training, keeper, best=best)


def evaluate_all(
    model: nn.Module,
    task: Task,
    data: Data,
    config: TrainConfig,
    world: World,
    stop: Stop | None = None,
    *,
    recalibrate: int = 0,
) -> dict[str, float]:
    """All figures of an evaluation, with those after recalibrating from so many training batches. Collective."""
    figures = evaluate(model, task, data.eval, config, world, stop)
    if recalibrate:
        figures |= evaluate_recalibrated(model, task, data, config, world, stop, recalibrate=recalibrate)
    return figures


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, batches: Batches, config: TrainConfig, world: World, stop: Stop | None = None
) -> dict[str, float]:
    """The metrics over every eval image exactly once, with rank 0's buffers on every rank. Collective.

    No batch is exchanged: ranks may have different numbers of them, or none. Raises Preempted once stop was asked.
    """
    model.eval()
    world.copy_from_rank_0(list(model.buffers()))
    totals = Totals(task.sums(), world)
    batches_left = iter(batches)
    for _ in range(batches.most):
        for batch in islice(batches_left, 1):
            with autocast(config, world):
                sums = task.evaluate(model, batch)
            totals.add(sums, batch.skipped)
        if stop and stop.asked():
            raise Preempted
    sums = totals.reduce()
    figures = {f"eval/{name}": value for name, value in task.metrics(sums).items()}
    return {**figures, "eval/images": sums["samples"], "eval/skipped_images": sums["skipped"]}


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
    recalibrated = drift.recalibrated(model, islice(data.sample, recalibrate), autocast(config, world))
    if recalibrated is None:
        return {}
    model, gaps = recalibrated
    figures = evaluate(model, task, data.eval, config, world, stop)
    renamed = {name.replace("eval/", "eval/recalibrated_"): value for name, value in figures.items()}
    unneeded = ("eval/recalibrated_images", "eval/recalibrated_skipped_images")
    return {name: value for name, value in renamed.items() if name not in unneeded} | gaps


def autocast(config: TrainConfig, world: World) -> AbstractContextManager:
    """bf16 or fp16 where that is exact enough, as the config says."""
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(world.device.type, dtype, enabled=config.precision != "fp32")


class Waited:
    """An iterator over training batches that knows how long it was waited for."""

    def __init__(self, batches: Batches, training: Training):
        self.batches: Iterator[Batch] = iter(batches)
        self.training = training
        self.began, self.waited_s = time.perf_counter(), 0.0

    def __iter__(self) -> "Waited":
        return self

    def __next__(self) -> Batch:
        asked = time.perf_counter()
        batch = next(self.batches)
        self.waited_s += time.perf_counter() - asked
        self.training.alive()
        return batch

    def restart_clock(self) -> tuple[float, float]:
        """Seconds since the last restart, and how many of them went by in waiting."""
        now = time.perf_counter()
        times = now - self.began, self.waited_s
        self.began, self.waited_s = now, 0.0
        return times
