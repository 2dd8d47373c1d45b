"""The training loop. It takes built objects and knows neither files nor configs of others."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from itertools import islice
from typing import Protocol

import torch
from torch import nn

from syncbn import Reading
from syncbn.trainer.data import Batch, Batches
from syncbn.trainer.errors import UserError
from syncbn.trainer.runs.metric import headline
from syncbn.trainer.runs.pictures import Shown
from syncbn.trainer.tasks.task import Loss, LossOf
from syncbn.trainer.training.cuda_graph import Capture, Captured, Done, Step, cuda_graph
from syncbn.trainer.training.evaluation import autocast, evaluate_all, show
from syncbn.trainer.training.options import TrainConfig
from syncbn.trainer.training.preemption import Preempted, Stop
from syncbn.trainer.training.state import Training
from syncbn.trainer.world import World


class Observer(Protocol):
    """Whoever watches a training, on rank 0."""

    def stepped(self, step: int) -> None: ...
    def evaluating(self, step: int) -> None: ...
    def log(self, step: int, figures: dict[str, float], reading: Reading | None = None) -> None: ...
    def show(self, step: int, shown: Shown) -> None: ...


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
            for sums, images, skipped in parts:
                training.totals.add(sums, images, skipped, bad)
            training.totals.add_step(bad)
            training.schedule.step()
            training.step += 1

            at_end = training.step >= steps
            evaluating = at_end or training.step % eval_every == 0
            if evaluating or training.step % config.log_every == 0:
                trained = read_figures(training, config, batches)
                due = evaluating or training.step % drift_every < config.log_every
                reading = training.drift.read() if training.drift and due else None
                if observer:
                    observer.log(training.step, trained, reading)
            if save_every and training.step % save_every == 0 and not evaluating:
                save_unless_bad(training, keeper)
            if observer:
                observer.stepped(training.step)
            if stop.asked():
                raise Preempted
    except Preempted:
        save_unless_bad(training, keeper)
        raise


def settle_buckets(training: Training, config: TrainConfig, world: World) -> None:
    """Have DDP order its buckets as it does in its first step, for a training that is past it. Collective.

    All of DDP's steps but the first add up gradients in buckets in the order of that one's backward, and a ring of more
    than two ranks adds up in an order that depends on the place. The pass leaves traces, which a state then overwrites.
    """
    for batch in islice(training.data.sample, 1):
        for part, loss_of in training.task.parts.items():
            with only(training.model.module, part), autocast(config, world):
                loss = loss_of(training.model, batch)
            loss.total.sum().backward()  # of several terms, if it has them
    training.optimizer.zero_grad()


def optimiser_step(training: Training, config: TrainConfig, world: World, batches: Iterable[Batch]) -> Done:
    """One step on config.accumulate batches of this rank: of each part in turn. Collective.

    It reads nothing back from the device and keeps no number of its own, so that it can be captured as a CUDA graph.
    """
    parts = training.task.parts
    if len(parts) > 1:
        batches = list(batches)  # each part sees them all
    done: list[Done] = []
    for part, loss_of in parts.items():
        with only(training.model.module, part):
            done.append(step_part(training, config, world, loss_of, batches))
    bad, sums = reduce(joined, done)
    training.guard.count(bad)
    if training.average:
        training.average.update_parameters(training.model.module)
    return bad, sums


def joined(one: Done, other: Done) -> Done:
    """What two parts of one step left: it is bad if one is, and has the sums of both."""
    sums = [({**a, **b}, images, skipped) for (a, images, skipped), (b, *_) in zip(one[1], other[1], strict=True)]
    return one[0] | other[0], sums


def step_part(training: Training, config: TrainConfig, world: World, loss_of: LossOf, batches: Iterable[Batch]) -> Done:
    """A forward and a backward of each batch, and a step of the optimiser on what they gave gradients to."""
    model, guard, sums, weights = training.model, training.guard, [], []
    images = training.data.global_batch * config.accumulate  # of all ranks, if none is broken
    for micro, batch in enumerate(batches, start=1):
        with model.no_sync() if micro < config.accumulate else nullcontext():
            with autocast(config, world):
                loss = loss_of(model, batch)
            if loss.total.ndim:
                loss = joined_terms(loss, training.data.global_batch, world)
            # DDP takes the mean over ranks
            guard.backward(loss.total, times=world.size / images)
        weights.append(loss.weight)
        sums.append((loss.sums, batch.samples, batch.skipped))
    times = None
    if training.task.weighs != "images" or training.data.skips:
        weight = world.sum(torch.stack(weights).double().sum())
        times = torch.where(weight > 0, images / weight, 0.0)
    bad = guard.step(config.clip_norm, times)
    training.optimizer.zero_grad()
    return bad, sums


def joined_terms(loss: Loss, images: int, world: World) -> Loss:
    """A loss of several terms as one: each divided by its weight over all ranks, for so many images. Collective."""
    weights = world.sum(loss.weight.detach().double())
    shares = torch.where(weights > 0, images / weights, 0.0).to(loss.total.dtype)
    return loss._replace(total=(loss.total * shares).sum(), weight=weights.new_tensor(images / world.size))


@contextmanager
def only(model: nn.Module, part: str) -> Iterator[None]:
    """A block in which no parameters of the model are trained but those of a submodule; of "", all of them."""
    if not part:
        yield
        return
    own = set(model.get_submodule(part).parameters())
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def read_figures(training: Training, config: TrainConfig, batches: "Waited") -> dict[str, float]:
    """The figures since the last reading, the task's if a step of it was good. Collective.

    Raises BadSteps, on every rank.
    """
    reduced = training.totals.reduce()
    in_a_row = int(training.guard.in_a_row)
    if in_a_row > config.max_bad_steps:
        raise BadSteps(training.step - in_a_row + 1, training.step)
    elapsed_s, waited_s = batches.restart_clock()
    images = reduced.steps * config.accumulate * training.data.global_batch - reduced.skipped
    learnt = training.task.figures(reduced.sums) if reduced.bad_steps < reduced.steps else {}
    figures = {f"train/{name}": value for name, value in learnt.items()}
    return {
        "epoch": training.epoch,
        **figures,
        "train/lr": training.optimizer.param_groups[0]["lr"],
        "train/images_per_s": images / elapsed_s,
        "train/step_ms": 1000 * elapsed_s / reduced.steps,
        "train/data_wait_share": waited_s / elapsed_s,
        "train/skipped_images": reduced.skipped,
        "train/bad_steps": reduced.bad_steps,
    }


def save_unless_bad(training: Training, keeper: Keeper | None, *, best: bool = False) -> None:
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
        figures, charts = evaluate_all(
            training.best_model, task, training.data, config, world, stop, recalibrate=training.recalibrate
        )
        shown = show(training.best_model, task, training.data, config, world, charts)
    finally:
        training.model.train()
    training.figures, training.evaluated = figures, training.step
    judged_by = headline(task.metrics)
    value = figures[f"eval/{judged_by.name}"]
    best = judged_by.improves(value, on=training.best)
    training.best = value if best else training.best
    if observer:
        observer.log(training.step, {"epoch": training.epoch, **figures})
        observer.show(training.step, shown)
    save_unless_bad(training, keeper, best=best)


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
