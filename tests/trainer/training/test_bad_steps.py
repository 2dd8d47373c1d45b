"""A step whose loss or gradient is not finite leaves no trace, and all ranks agree on it."""

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn.trainer.config import typed
from syncbn.trainer.errors import UserError
from syncbn.trainer.models.residual import SmallResNet
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.tasks.classify import Classify
from syncbn.trainer.training import loop, optim
from syncbn.trainer.training.bad_steps import GROW, Guard
from tests.ranks import run_ranks
from tests.trainer.on_ranks import Log, world_of


class Blows(nn.Module):
    """A model of which one rank's forward, or only its loss, or only its gradient, is not finite in some forwards."""

    def __init__(self, num_classes):
        super().__init__()
        self.net, self.calls = SmallResNet(8, num_classes, width=4), 0
        self.kind, self.bad, self.now = "", (), False

    def forward(self, x):
        self.calls += self.training
        last_rank = dist.get_rank() == dist.get_world_size() - 1
        self.now = bad = self.training and self.calls in self.bad and last_rank
        if bad and self.kind == "image":
            x = x * math.nan  # through every layer and every rank's statistics
        scores = self.net(x)
        if bad and self.kind == "gradient":
            scores = Overflow.apply(scores)
        return scores


class Infinite(Classify):
    """A loss that is infinite while its gradient is not."""

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        infinite = model.module.now and model.module.kind == "loss"
        return loss._replace(total=loss.total + (math.inf if infinite else 0))


class Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * math.inf


def train(rank, kind, bad, overrides):
    """Weights, averages and optimiser after each step; what was logged and saved; the error, if there was one."""
    config = typed({"model": {"name": f"{__name__}:Blows"}, **overrides})
    world, log, states = world_of(rank), Log(), []
    training = assemble(build(config, world), config, world)
    training.model.module.kind, training.model.module.bad = kind, bad

    def stepped(step):
        kept = [training.model.module.state_dict(), training.optimizer.state_dict()["state"]]
        states.append([t.clone() for t in tensors(kept)])

    log.stepped, error, training.task = stepped, None, Infinite()
    try:
        loop.fit(training, config.train, world, log, log, save_every=config.checkpoint.every)
    except UserError as raised:
        error = str(raised)
    return states, log.lines, log.saved, error


def tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [t for value in state.values() for t in tensors(value)] if isinstance(state, dict) else [
        t for value in state for t in tensors(value)
    ]  # fmt: skip


def unmoved(before, after):
    return all(map(torch.equal, before, after))


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["image", "loss", "gradient"])
def test_a_bad_step_of_one_rank_is_left_out_by_all(kind, optimiser):
    settings = {
        "optim": {"name": optimiser, "lr": 0.01},
        "train": {"steps": 6, "log_every": 3, "ema": 0.5, "clip_norm": 1.0},
    }
    ranks = run_ranks(train, 2, kind, (1, 4), settings)
    for states, lines, _, error in ranks:
        assert error is None
        assert all(t.isfinite().all() for state in states for t in state)
        assert [unmoved(*pair) for pair in pairwise(states)] == [False, False, True, False, False]
        assert [figures["train/bad_steps"] for _, figures in lines if "train/bad_steps" in figures] == [1, 1]
        assert all(0 < figures["train/loss"] < 5 for _, figures in lines if "train/loss" in figures)
    assert unmoved(ranks[0][0][-1], ranks[1][0][-1])


def test_the_first_step_of_all_may_be_bad():
    """torch 2.15 (fused SGD) leaves momentum as it found the memory."""
    states, *_ = run_ranks(train, 1, "gradient", (1,), {"train": {"steps": 2}})[0]
    momentum = states[0][-5:]
    assert all((m == 0).all() for m in momentum)


def test_a_bad_micro_batch_spoils_its_step_alone():
    settings = {"train": {"steps": 3, "log_every": 1, "accumulate": 2}}
    for states, lines, _, _ in run_ranks(train, 2, "loss", (3,), settings):
        assert [figures["train/bad_steps"] for _, figures in lines if "train/bad_steps" in figures] == [0, 1, 0]
        assert [step for step, figures in lines if "train/loss" in figures] == [1, 3]
        assert unmoved(states[0], states[1])
        assert not unmoved(states[1], states[2])


def test_too_many_in_a_row_end_the_run_and_nothing_is_saved_meanwhile():
    settings = {
        "train": {"steps": 20, "log_every": 4, "eval_every": 4, "max_bad_steps": 2},
        "checkpoint": {"every": 1},
    }
    for _, _, saved, error in run_ranks(train, 2, "image", range(7, 30), settings):
        # Steps 7 and 8 are not too many yet
        assert error == "the loss or the gradient is not finite from step 7 to step 12"
        assert saved == [1, 2, 3, 4, 5, 6]


def test_as_many_but_not_in_a_row_do_not():
    settings = {"train": {"steps": 12, "log_every": 2, "max_bad_steps": 2}}
    *_, error = run_ranks(train, 2, "loss", (1, 2, 4, 5, 7, 8, 10, 11), settings)[0]
    assert error is None


def test_half_precision_trains_with_a_scaled_loss():
    settings = {"train": {"steps": 8, "log_every": 8, "precision": "fp16"}, "optim": {"lr": 0.05}}
    for states, lines, _, error in run_ranks(train, 2, "gradient", (3,), settings):
        assert error is None
        assert lines[0][1]["train/bad_steps"] >= 1
        assert all(t.isfinite().all() for state in states for t in state)
        assert not unmoved(states[0], states[-1])


def scales(bad_steps):
    """The loss scale after each step of a model of one weight, whose gradient is always 1 but in bad steps."""
    weight = nn.Parameter(torch.ones(1))
    model = nn.Module()
    model.weight = weight
    guard = Guard(model, optim.build(optim.OptimConfig(lr=0.5, scaling="none", momentum=0), model, 1), scaled=True)
    for bad in bad_steps:
        guard.backward((weight * (math.inf if bad else 1)).sum(), times=1.0)
        guard.count(guard.step())
        guard.optimizer.zero_grad()
        yield guard.scale.item(), weight.item()


def test_the_scale_halves_after_a_bad_step_and_grows_after_many_good_ones():
    steps = list(scales([True, False, True] + [False] * GROW))
    assert [scale for scale, _ in steps[:4]] == [2**15, 2**15, 2**14, 2**14]
    assert [scale for scale, _ in steps[-2:]] == [2**14, 2**15]
    assert [weight for _, weight in steps[:3]] == [1.0, 0.5, 0.5]  # the gradient itself is not scaled
