"""Half precision: gradients are rounded once, however large what cancels in them, and sums keep five digits."""

from unittest.mock import patch

import pytest
import torch
from torch.testing import assert_close

from syncbn import SyncBatchNorm, kernels
from syncbn.kernels import Affine
from tests.op.kernel_steps import DEVICE, MAKES, make

HALVES = [torch.float16, torch.bfloat16]


def gradient(kernel, x, g, mask=None):
    """dx of a layer without parameters, by those kernels or compiled."""
    layer, x = SyncBatchNorm(x.size(1), affine=False).to(DEVICE), x.to(DEVICE).requires_grad_()
    mask = None if mask is None else mask.to(DEVICE)
    if kernel == "compiled":
        torch._dynamo.reset()
        layer.compile(fullgraph=True, backend="aot_eager")
        (dx,) = torch.autograd.grad(layer(x, mask=mask), x, g.to(DEVICE))
        return dx.cpu()
    kernel = make(kernel)
    with patch.object(kernels, "choose", lambda x: kernel):
        (dx,) = torch.autograd.grad(layer(x, mask=mask), x, g.to(DEVICE))
    return dx.cpu()


def exact(x, g, mask=None):
    return gradient("eager", x.double(), g.double(), mask)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kernel", [*MAKES, "compiled"])
def test_what_cancels_is_rounded_once(kernel, dtype):
    """Rounded to fp16 before they were added, 1e-5 came out as 0."""
    x = torch.tensor([[1.0], [2.0], [4.0]], dtype=dtype)
    # Numbers about 1 are taken from each other in float32
    assert_close(gradient(kernel, x, x).double(), exact(x, x), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("kernel", [*MAKES, "compiled"])
def test_a_constant_gradient_leaves_nothing_though_its_scale_is_no_half(kernel):
    """900 / sqrt(eps) is more than fp16 holds: inf - inf."""
    x = torch.tensor([[0.0], [0.0], [0.0], [0.01]], dtype=torch.float16)
    assert_close(gradient(kernel, x, torch.full_like(x, 900)), torch.zeros_like(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kernel", [*MAKES, "compiled"])
def test_what_is_masked_has_its_own_gradient_alone(kernel, dtype):
    """inf * False was NaN."""
    x, mask = torch.tensor([[0.0], [0.0], [1.0]], dtype=dtype), torch.tensor([True, True, False])
    got = gradient(kernel, x, torch.ones_like(x), mask)
    assert got[2].item() == pytest.approx(316.2, rel=torch.finfo(dtype).eps)
    assert_close(got.double(), exact(x, torch.ones_like(x), mask), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("kernel", [*MAKES, "compiled"])
def test_the_gradient_of_a_sum_lies_in_memory_as_one_value(kernel, dtype):
    """Of such a gradient aten adds up halves in half precision: 257 ones came to 256."""
    x = torch.randn(257, 4).to(dtype)
    assert gradient(kernel, x, torch.ones((), dtype=dtype).expand(257, 4)).abs().max() < 1e-5


SIZES = [(257, 4), (2048, 64), (8, 4, 256), (33, 8, 25_600), (1, 2, 25_601), (2, 2, 5003), (64, 3, 112, 112)]
SIZES += [(1000, 4, 7, 7), (16, 4, 4000)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("value", [0.1, 0.97, 1.3])
@pytest.mark.parametrize("kernel", ["eager", "cpu"])
def test_a_long_sum_of_one_value_keeps_five_digits(kernel, value, shape, dtype):
    """In one float32, fp16 was off by 1.5e-3 and float32 by 3e-5; of 2048 rows one by one, float32 by 1.4e-5.

    Squares of halves of several planes were off by 1e-4.
    """
    kernel, channels, dy = make(kernel), shape[1], torch.full(shape, value).to(dtype)
    count, exact = dy.numel() // channels, dy.flatten()[0].double()
    stats = torch.cat([torch.zeros(channels), torch.ones(channels), torch.tensor([count]), torch.ones(channels)])
    for last in (False, True) if dy.dim() == 4 else (False,):
        if last:
            dy = dy.contiguous(memory_format=torch.channels_last)
        total, squares = kernel.grad_sums(dy, dy, stats.double(), Affine(), None).packed.chunk(2)
        assert_close(total / count, exact.expand(channels), rtol=1e-5, atol=0)
        assert_close(squares / count, exact.square().expand(channels), rtol=1e-5, atol=0)
