"""Backward: what is sent when, by whom, and gradients of gradients."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from syncbn import SyncBatchNorm, reference, sync_batch_norm
from tests.messages import recorded
from tests.op.steps import EXACT, batch, layer_of
from tests.ranks import run_ranks


def messages_of_a_step(rank, x, options, with_mask):
    layer = SyncBatchNorm(3, **options)
    layer(x).sum()  # the group is formed here
    mask = torch.ones(len(x), dtype=torch.bool) if with_mask else None
    x = x.clone().requires_grad_()
    with recorded() as sent:
        layer(x, mask=mask).sum().backward()
    with recorded() as nothing:
        layer.eval()(x).sum().backward()
    assert nothing == []
    return sent


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"bias": False},
        {"group": 2},
        {"group": "node"},
        {"group": [0, 1]},
        {"group": {"samples": 9}},
    ],
    ids=str,
)
def test_one_message_each_way_whatever_the_options(dtype, options, with_mask):
    x = batch((3, 4, 2))[0].to(dtype)

    for sent in run_ranks(messages_of_a_step, 2, x, options, with_mask):
        assert sent == [("all_reduce", 2 * 3 + 1, torch.float64), ("all_reduce", 2 * 3, torch.float64)]


def test_gathered_moments_are_one_message_each_way_too():
    for sent in run_ranks(messages_of_a_step, 2, batch((3, 4, 2))[0], {"reduction": "gather"}, False):
        assert sent == [("all_gather", 2 * 3 + 1, torch.float64), ("all_gather", 2 * 3, torch.float64)]


def own_communicator(rank):
    from syncbn.collectives import Spec, resolve

    first, second = Spec("world"), Spec("world")
    group = resolve(first.key)
    return group is not dist.group.WORLD, group is resolve(second.key), group.size()


def test_messages_have_a_communicator_of_their_own():
    assert run_ranks(own_communicator, 2) == [(True, True, 2)] * 2


def asymmetric(rank, needs, xs, dys):
    """A step where rank r needs the gradients that needs[r] names; the others' come out all the same."""
    layer = layer_of(3)
    for name, parameter in layer.named_parameters():
        nn.init.ones_(parameter)
        parameter.requires_grad_(name in needs[rank])
    x = xs[rank].clone().requires_grad_("x" in needs[rank])
    y = layer(x)
    y.backward(dys[rank])
    return {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize(
    "needs",
    [
        [["x", "weight", "bias"], []],
        [[], ["x"]],
        [["weight"], ["x", "bias"]],
        [["bias"], []],
        [[], []],
    ],
    ids=str,
)
def test_ranks_may_differ_in_what_needs_a_gradient(needs):
    x, dy = batch((3, 4, 2))
    xs, dys = x.split([5, 3]), dy.split([5, 3])

    everything = run_ranks(asymmetric, 2, [["x", "weight", "bias"]] * 2, xs, dys)
    for got, full, wanted in zip(run_ranks(asymmetric, 2, needs, xs, dys), everything, needs, strict=True):
        for name in full:
            if name in wanted:
                assert_close(got[name], full[name], rtol=0, atol=0)
            else:
                assert got[name] is None


def without_affine_or_gradient(rank, x):
    layer = SyncBatchNorm(3, affine=False, dtype=x.dtype)
    layer(x.clone().requires_grad_(rank == 0)).sum().backward()
    return layer.running_mean


def test_a_rank_with_nothing_to_learn_still_takes_part():
    first, second = run_ranks(without_affine_or_gradient, 2, batch((3, 4))[0])
    assert_close(first, second)


def no_gradient(rank, x):
    with torch.no_grad():
        return SyncBatchNorm(3, dtype=x.dtype)(x).requires_grad


def test_without_grad_mode_there_is_no_graph():
    assert run_ranks(no_gradient, 2, batch((3, 4))[0]) == [False, False]


class Enter(torch.autograd.Function):
    """The same tensor on every rank; its gradient is the sum of the ranks'."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return Leave.apply(gradient)


class Leave(torch.autograd.Function):
    """The sum of the ranks' tensors; each has its gradient."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return Enter.apply(gradient)


def checked_numerically(rank, split, options):
    """gradcheck and gradgradcheck of batch norm as a function of the whole batch, computed by all ranks together."""
    generator = torch.Generator().manual_seed(0)
    x = (2 + torch.randn(sum(split), 2, 3, dtype=torch.float64, generator=generator)).requires_grad_()
    weight, bias = (torch.rand(2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    mask = None
    if options.pop("masked", False):
        mask = (torch.rand(sum(split), 1, 3, generator=generator) < 0.7).split(split)[rank]

    def whole(x, weight, bias):
        x, weight, bias = map(Enter.apply, (x, weight, bias))
        y, _ = sync_batch_norm(x.split(split)[rank], weight, bias, mask=mask, eps=0.01, **options)
        places = [torch.zeros(n, 2, 3, dtype=y.dtype) for n in split]
        places[rank] = y
        return Leave.apply(torch.cat(places))

    inputs = x, weight, bias
    return torch.autograd.gradcheck(whole, inputs), torch.autograd.gradgradcheck(whole, inputs)


@pytest.mark.plain("[3]-{'masked': True}", "[2, 1]-{}", "[3, 0]-{'reduction': 'gather'}", "[1, 1, 1]-{'masked': True}")
@pytest.mark.parametrize("options", [{}, {"reduction": "gather"}, {"masked": True}], ids=str)
@pytest.mark.parametrize("split", [[3], [2, 1], [3, 0], [1, 1, 1]], ids=str)
def test_first_and_second_order_gradients_agree_with_differences(split, options):
    assert run_ranks(checked_numerically, len(split), split, options) == [(True, True)] * len(split)


def gradient_penalty(rank, xs, needs_x):
    """The gradient of a gradient's norm, as GANs use it; float32."""
    layer = layer_of(3, torch.float32)
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    x = xs[rank].clone().requires_grad_(needs_x[rank])
    (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), layer.weight, create_graph=True)
    dx.square().sum().backward()
    return layer.weight.grad


def test_second_order_where_only_one_rank_needs_the_gradient_of_its_input():
    x = batch((3, 4), torch.float32)[0].split([5, 3])

    both, one = (run_ranks(gradient_penalty, 2, x, needs) for needs in ([True, True], [True, False]))

    assert_close(one, both)


def penalised_whole(x):
    weight = torch.ones(3, dtype=x.dtype, requires_grad=True)
    y = reference.batch_norm(x, weight, torch.ones(3, dtype=x.dtype))
    (dweight,) = torch.autograd.grad(y.pow(3).sum(), weight, create_graph=True)
    dweight.sum().backward()
    return weight.grad


def penalised(rank, xs):
    layer = SyncBatchNorm(3, dtype=torch.float64)
    nn.init.ones_(layer.bias)
    (dweight,) = torch.autograd.grad(layer(xs[rank]).pow(3).sum(), layer.weight, create_graph=True)
    dweight.sum().backward()
    return layer.weight.grad


def test_a_gradient_penalty_of_the_ranks_is_that_of_the_whole_batch():
    x = batch((3, 4))[0]

    ranks = run_ranks(penalised, 2, x.split([5, 3]))

    assert_close(sum(ranks), penalised_whole(x), **EXACT)


class Twice(nn.Module):
    """A module that is used twice in one forward."""

    def __init__(self):
        super().__init__()
        self.norm = SyncBatchNorm(3, dtype=torch.float64)

    def forward(self, x):
        return self.norm(self.norm(x).relu() + x)


def trained_twice(rank, xs, forwards):
    net = Twice()
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    shares = [torch.chunk(x, dist.get_world_size())[rank] for x in xs] if dist.is_initialized() else xs
    # The mean over ranks of sums over shares: half of the sum over the batch
    sum(model(x).square().sum() for x in shares[:forwards]).backward()
    return {n: p.grad for n, p in net.named_parameters()}, {n: b.clone() for n, b in net.named_buffers()}


@pytest.mark.parametrize("forwards", [1, 2], ids=["one-forward", "two-forwards-one-backward"])
def test_a_layer_used_twice_under_ddp(forwards):
    xs = [batch((3, 4))[0], 3 + 2 * batch((3, 5), mean=1.0)[0]]

    gradients, buffers = trained_twice(0, xs, forwards)
    for rank_gradients, rank_buffers in run_ranks(trained_twice, 2, xs, forwards):
        # Sums over a hundred values that cancel to nothing
        assert_close({n: 2 * g for n, g in rank_gradients.items()}, gradients, rtol=1e-11, atol=1e-11)
        assert_close(rank_buffers, buffers, **EXACT)
