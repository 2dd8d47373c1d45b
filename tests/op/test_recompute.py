"""Activation checkpointing: the second run of a forward sends nothing and moves no buffer."""

import gc

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, recompute, reference
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
    kept = sum(type(value) is recompute.Book for value in gc.get_objects())
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


class Twice(nn.Module):
    """One layer, called in two regions of one kind, and twice in each."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.bn = kind, SyncBatchNorm(2, dtype=torch.float64)

    def forward(self, *xs):
        return [run(self.kind, lambda x: self.bn(self.bn(x).pow(2)), x) for x in xs]


def gradients_of_two_calls(rank, kind, inputs, create_graph, backwards):
    net = Twice(kind)
    xs = [x.clone().requires_grad_() for x in inputs[rank]]
    loss = sum((i + 1) * y.pow(3).sum() for i, y in enumerate(net(*xs)))
    wanted = [*xs, *net.parameters()]
    for _ in range(backwards):
        gradients = torch.autograd.grad(loss, wanted, retain_graph=True, create_graph=create_graph)
    if create_graph:
        gradients += torch.autograd.grad(sum(g.square().sum() for g in gradients), wanted)
    return [g.detach() for g in gradients]


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize(
    "kind, create_graph", [("non-reentrant", False), ("non-reentrant", True), ("reentrant", False)]
)
def test_calls_of_equal_values_on_one_rank_are_told_apart(kind, create_graph, backwards):
    """Told apart by values, the second call had the first's statistics: gradients off by 0.4, without a word."""
    same, *others = torch.randn(3, 3, 2, dtype=torch.float64)
    inputs = [(same, same), tuple(others)]
    if kind == "reentrant":
        # torch.autograd.grad is not for reentrant regions
        plain, got = (run_ranks(gradients_by_backward, 2, k, inputs, backwards) for k in (None, kind))
    else:
        args = inputs, create_graph, backwards
        plain, got = (run_ranks(gradients_of_two_calls, 2, k, *args) for k in (None, kind))

    assert_close(got, plain, **EXACT)


def gradients_by_backward(rank, kind, inputs, backwards):
    net = Twice(kind)
    xs = [x.clone().requires_grad_() for x in inputs[rank]]
    loss = sum((i + 1) * y.pow(3).sum() for i, y in enumerate(net(*xs)))
    for _ in range(backwards):
        loss.backward(retain_graph=True)
    return [t.grad for t in (*xs, *net.parameters())]


def changing(kind, first, second):
    """A region that calls a layer so often when it runs first, and so often when it runs again."""
    bn, times = SyncBatchNorm(2), iter([first, second])

    def region(x):
        for _ in range(next(times)):
            x = bn(x).sin()
        return x.exp()

    run(kind, region, torch.randn(3, 2, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("first, second", [(0, 1), (1, 2)])
def test_a_call_that_was_not_there_the_first_time_is_an_error(kind, first, second):
    with pytest.raises(RuntimeError, match=f"for the {first + 1}. time, which it had called {first} times"):
        changing(kind, first, second)


def test_a_call_in_double_precision_is_that_of_the_whole_batch_again():
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    bn = SyncBatchNorm(2, dtype=torch.float64)

    (got,) = torch.autograd.grad(checkpoint(bn, x, use_reentrant=False).pow(3).sum(), x, create_graph=True)

    (want,) = torch.autograd.grad(reference.batch_norm(x, None, None).pow(3).sum(), x, create_graph=True)
    assert_close(got, want, **EXACT)
