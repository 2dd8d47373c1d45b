"""A training that is interrupted and gone on with is the training undisturbed, bit for bit."""

import io
import math
import random

import numpy
import pytest
import torch
from torch import nn

from syncbn.trainer.config import typed
from syncbn.trainer.models.residual import SmallResNet
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.runs.checkpoint import copied
from syncbn.trainer.training import drift, loop
from syncbn.trainer.training.resume import Start
from tests.launch.jobs import TIMES, differing
from tests.ranks import run_ranks
from tests.trainer.on_ranks import Log, world_of
from tests.trainer.trained import DETECTION, SEGMENTATION


class Dicing(nn.Module):
    """A small network that draws from every generator there is."""

    def __init__(self, num_classes):
        super().__init__()
        self.net, self.drop = SmallResNet(8, num_classes, width=4), nn.Dropout2d(0.2)

    def forward(self, x):
        if self.training:
            x = x * (1 + 0.1 * random.random()) + 0.1 * numpy.random.rand()
        return self.net(self.drop(x))


def settings(*, data=None, optim=None, norm="sync", level="image", checkpoint=None, **train):
    return {
        "data": {"batch_per_rank": 4, "augment": {"pad": 1}, **(data or {})},
        "optim": {"lr": 0.1, "scaling": "none", **(optim or {})},
        "norm": {"name": norm},
        "drift": {"level": level},
        "model": {"name": f"{__name__}:Dicing"},
        "train": {"steps": 12, "log_every": 5, "eval_every": 8, **train},
        "checkpoint": checkpoint or {},
    }


class Interrupted(Exception):
    pass


class Keeper:
    """Keeps the state after a step, and has the training die there."""

    def __init__(self, world, at):
        self.world, self.at, self.kept = world, at, None

    def save(self, training, *, best=False):
        state = copied(training.state(self.world))
        if training.step == self.at:
            # rank 0's for all, through a file
            state = self.world.from_rank_0(saved(state) if self.world.rank == 0 else None)
            self.kept = torch.load(io.BytesIO(state), weights_only=True)
            raise Interrupted


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def train(rank, overrides, at=None, start=None, keep=False):
    """Train, perhaps from a state: what is logged, the state in the end, or where it was interrupted."""
    config = typed(overrides)
    world, log = world_of(rank), Log()
    begin = Start(start, None, own=True) if start else None
    parts = build(config, world, begin)
    training = assemble(parts, config, world)
    training.drift = drift.monitor(parts.model, config.drift)
    if begin:
        loop.settle_buckets(training, config.train, world)
        begin.take_up(training, world, seed=config.seed)
    keeper = Keeper(world, at)
    try:
        loop.fit(training, config.train, world, log, keeper, save_every=1)
        state = copied(training.state(world))
    except Interrupted:
        state = keeper.kept
    finally:
        if training.drift:
            training.drift.close()
    lines = [(step, {k: v for k, v in figures.items() if k not in TIMES}) for step, figures in log.lines]
    return lines, state


def resumed(rank, overrides, at):
    """Interrupted after a step and gone on with: all lines, and the state in the end."""
    before, state = train(rank, overrides, at)
    after, end = train(rank, overrides, start=state)
    return before + after, end


TRAININGS = {
    "sgd-everything": settings(data={"augment": {"pad": 1, "mixup": 0.2}}, accumulate=2, ema=0.75, clip_norm=0.5),
    "adamw": settings(optim={"name": "adamw", "lr": 0.01}, level="rank"),
    "local": settings(norm="local", ema=0.75),
    "rates": settings(optim={"lr_factors": {"net.fc": 10}}) | {"schedule": {"name": "poly"}},
    "segmentation": settings(ema=0.75) | SEGMENTATION,
    "detection": settings(ema=0.75) | DETECTION,
    "fp16": settings(precision="fp16", level="off"),
    "batch_renorm": settings(norm="batch_renorm", ema=0.75),
    "evonorm_s0": settings(norm="evonorm_s0", optim={"name": "adamw", "lr": 0.01}),
}


@pytest.mark.plain("sgd-everything-5", "fp16-4", "local-7", "rates-7", "segmentation-5", "detection-5")
@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("sgd-everything", 3),  # in the middle of a window of figures
        ("sgd-everything", 5),  # after a line of the log
        ("sgd-everything", 8),  # after an evaluation
        ("adamw", 1),
        ("adamw", 11),
        ("local", 7),
        ("rates", 7),
        ("segmentation", 5),
        ("detection", 5),
        ("fp16", 4),
        ("batch_renorm", 7),
        ("evonorm_s0", 3),
    ],
)
def test_what_is_gone_on_with_is_what_was_not_interrupted(name, at):
    want = run_ranks(train, 2, TRAININGS[name])
    got = run_ranks(resumed, 2, TRAININGS[name], at)
    for rank in 0, 1:
        assert got[rank][0] == want[rank][0]
    assert differing(got[0][1], want[0][1]) == []


@pytest.mark.slow
def test_more_than_two_ranks_too():
    """DDP fills its buckets in another order from its second step on, and gloo's ring adds up by place."""
    overrides = settings(data={"batch_per_rank": 2})
    (want, state), *_ = run_ranks(train, 4, overrides)
    (got, again), *_ = run_ranks(resumed, 4, overrides, 3)
    assert got == want
    assert differing(again, state) == []


def on_other_ranks(overrides, at, before, after):
    state = run_ranks(train, before, overrides, at)[0]
    ranks = run_ranks(train, after, overrides, None, state[1])
    return state[0] + ranks[0][0], ranks[0][1]


@pytest.mark.plain("2-1")
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4), (4, 3)])
def test_other_ranks_go_on_with_the_same_global_batches(before, after):
    overrides = settings(data={"batch_per_rank": 16 // before, "augment": {"mixup": 0.2}}, level="off", ema=0.5)
    overrides["model"] = {"name": "tests.trainer.on_ranks:Exact"}
    (want, state), *_ = run_ranks(train, before, overrides)

    got, end = on_other_ranks(overrides, 6, before, after)

    assert [step for step, _ in got] == [step for step, _ in want]
    for (step, mine), (_, theirs) in zip(got, want, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9), step
    for name, value in state["average"].items():
        torch.testing.assert_close(end["average"][name], value, rtol=1e-9, atol=1e-9)


def test_the_state_holds_no_more_than_plain_things_and_every_generator():
    state = run_ranks(train, 2, settings(), 3)[0][1]
    assert len(state["own"]) == 2
    assert set(state["own"][0]["random"]) == {"python", "numpy", "torch", "cuda"}
    assert math.isfinite(state["global_batch"])
