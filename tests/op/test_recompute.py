"""Activation checkpointing: the second run of a forward sends nothing and moves no buffer."""

import gc

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm
from tests.messages import recorded
from tests.op.steps import EXACT, batch
from tests.ranks import run_ranks


class Segments(nn.Module):
    """Three blocks, each checkpointed or not; the first layer is used twice in a block and once in another."""

    def __init__(self, outer, inner):
        super().__init__()
        torch.manual_seed(0)
        self.outer, self.inner = outer, inner
        self.a, self.b, self.c = (SyncBatchNorm(3, dtype=torch.float64) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1, dtype=torch.float64) for _ in range(3))

    def forward(self, x):
        x = run(self.outer, lambda x: self.a(self.convs[0](self.a(x).relu())).relu(), x)
        x = run(self.outer, lambda x: self.b(self.convs[1](x)).sigmoid(), x)
        return run(
            self.outer,
            lambda x: run(self.inner, lambda x: self.c(self.a(self.convs[2](x)), x, activation="relu"), x),
            x,
        )


def run(kind, block, x):
    return block(x) if kind is None else checkpoint(block, x, use_reentrant=kind == "reentrant")


def trained(rank, xs, outer, inner, forwards):
    net = Segments(outer, inner)
    net(xs[rank])  # the group is formed here; no backward follows
    inputs = [(xs[rank] * (i + 1)).requires_grad_() for i in range(forwards)]
    with recorded() as sent:
        losses = [net(x).square().sum() for x in inputs]
        sum(losses).backward()
    del losses
    gc.collect()
    kept = sum(len(vars(layer)["_recall"]._alive()) for layer in (net.a, net.b, net.c) if "_recall" in vars(layer))
    state = {name: t.clone() for name, t in net.state_dict().items()}
    gradients = {name: p.grad for name, p in net.named_parameters()} | {f"x{i}": x.grad for i, x in enumerate(inputs)}
    return gradients, state, len(sent), kept


KINDS = [
    ("non-reentrant", None),
    ("reentrant", None),
    ("non-reentrant", "non-reentrant"),
    ("reentrant", "reentrant"),
    ("non-reentrant", "reentrant"),
    ("reentrant", "non-reentrant"),
]


@pytest.mark.plain("non-reentrant-None-1", "reentrant-None-2", "reentrant-non-reentrant-1", "non-reentrant-reentrant-2")
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize(("outer", "inner"), KINDS)
def test_checkpointing_changes_nothing(outer, inner, forwards):
    xs = batch((3, 4, 2), mean=1.0)[0].split([5, 3])

    plain = run_ranks(trained, 2, xs, None, None, forwards)
    checkpointed = run_ranks(trained, 2, xs, outer, inner, forwards)

    for (gradients, state, sent, kept), (want_gradients, want_state, want_sent, _) in zip(
        checkpointed, plain, strict=True
    ):
        assert sent == want_sent == 2 * 5 * forwards
        assert_close(state, want_state, rtol=0, atol=0)
        assert_close(gradients, want_gradients, **EXACT)
        assert kept == 0  # nothing is remembered after backward


@pytest.mark.parametrize(("outer", "inner"), KINDS)
def test_alone_the_buffers_move_once_too(outer, inner):
    xs = [batch((3, 4, 2), mean=1.0)[0]]
    _, want, _, _ = trained(0, xs, None, None, 1)
    _, state, _, _ = trained(0, xs, outer, inner, 1)
    assert_close(state, want, rtol=0, atol=0)


def forward_within_backward(rank, xs):
    """A forward that happens to run in a hook of backward is an ordinary forward."""
    first, second = (SyncBatchNorm(3, dtype=torch.float64) for _ in range(2))
    y = first(xs[rank].clone().requires_grad_())

    def hook(_):
        second(xs[rank])

    y.register_hook(hook)
    y.sum().backward()
    return second.running_mean, second.num_batches_tracked.item()


def test_an_ordinary_forward_within_backward():
    x = batch((3, 4))[0]
    for mean, batches in run_ranks(forward_within_backward, 2, x.split([5, 3])):
        assert batches == 1
        assert_close(mean, 0.1 * x.mean((0, 2)), **EXACT)
