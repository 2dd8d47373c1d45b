"""Values that are bad and yet legal: what comes of them is what nn.BatchNorm makes of the whole batch."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from syncbn import SyncBatchNorm
from tests.op.steps import batch, joined, train_layer
from tests.ranks import run_ranks


def put(value, *places):
    """x with that value at some places, each (image, channel) or a channel of all images."""

    def change(x):
        for place in places:
            x[place] = value
        return x

    return change


IMAGES = {
    "plain": lambda x: x,
    "a constant channel": put(7.0, (slice(None), 1)),
    "all constant": put(0.1, slice(None)),
    "all zero": put(0.0, slice(None)),
    "a black image": put(0.0, 2),
    "a pixel that is no number": put(math.nan, (3, 0, 1, 1)),
    "an infinite pixel": put(math.inf, (3, 2, 0, 0)),
    "one rank all infinite": put(-math.inf, slice(6, 7)),
    "denormal": lambda x: x * 1e-310,
    "huge": lambda x: x * 1e150,
}
OPTIONS = {
    "plain": {},
    "momentum 0": {"momentum": 0.0},
    "momentum 1": {"momentum": 1.0},
    "cumulative": {"momentum": None},
    "eps 1e-3": {"eps": 1e-3},
    "eps 1": {"eps": 1.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("change", IMAGES.values(), ids=IMAGES)
def test_they_come_to_what_torch_makes_of_the_whole_batch(change, options):
    """Seven images, a prime number, on three ranks, one of which has a single image."""
    x, dy = batch((3, 4, 2), n=7, mean=1.0)
    x = change(x)
    layer, torchs = SyncBatchNorm(3, dtype=torch.float64, **options), nn.BatchNorm2d(3, dtype=torch.float64, **options)
    split = [4, 2, 1]
    got = joined(run_ranks(train_layer, 3, layer, x.split(split), dy.split(split)))
    want = train_layer(0, torchs, [x], [dy])
    if x.isfinite().all() and x.abs().max() < 1e100:
        assert_close(got, want, rtol=1e-9, atol=1e-9)
        return
    # Where torch has a number, so has this layer, and the same: another channel's fault is no concern of it
    for name in "y", "dx":
        assert_close(got[name].isfinite(), want[name].isfinite())
        assert_close(got[name], want[name], rtol=1e-9, atol=1e-9, equal_nan=True)
    for name in "running_mean", "running_var":
        finite = want["buffers"][name].isfinite()
        assert torch.equal(got["buffers"][name].isfinite(), finite)
        assert_close(got["buffers"][name][finite], want["buffers"][name][finite], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("x_needs_gradient", [True, False])
def test_a_part_that_is_frozen_has_no_gradient_and_the_rest_the_same(frozen, x_needs_gradient):
    x, dy = batch((3, 4, 2), n=5)
    for gradients in run_ranks(frozen_step, 2, x.split([4, 1]), dy.split([4, 1]), frozen, x_needs_gradient):
        own, whole = gradients
        assert own.keys() == whole.keys()
        assert frozen not in own
        assert_close(own, whole, rtol=1e-12, atol=1e-12)


def frozen_step(rank, xs, dys, frozen, x_needs_gradient):
    """The gradients of a layer of which a part is frozen, and those of one of which nothing is, but for that part."""
    gradients_of_both = []
    for freeze in True, False:
        layer = SyncBatchNorm(3, dtype=torch.float64)
        getattr(layer, frozen).requires_grad_(not freeze)
        x = xs[rank].clone().requires_grad_(x_needs_gradient or not freeze)
        layer(x).backward(dys[rank])
        gradients = {name: p.grad for name, p in layer.named_parameters() if name != frozen or freeze}
        gradients_of_both.append({name: g for name, g in gradients.items() if g is not None})
        if x_needs_gradient:
            gradients_of_both[-1]["x"] = x.grad
    return gradients_of_both
