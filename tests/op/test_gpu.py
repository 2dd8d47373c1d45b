"""On a GPU: the same numbers as on the CPU, and no wait of the host. Needs one; elsewhere it is skipped."""

import copy

import pytest
import torch
from torch.testing import assert_close

from syncbn import SyncBatchNorm
from tests.op.steps import EXACT, assert_near, batch, layer_of, train_layer, whole_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def on_gpu(layer, x, dy):
    answers = train_layer(0, copy.deepcopy(layer).cuda(), [x.cuda()], [dy.cuda()])
    return {name: on_cpu(value) for name, value in answers.items()}


def on_cpu(value):
    return {name: t.cpu() for name, t in value.items()} if isinstance(value, dict) else value.cpu()


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
def test_float64_equals_the_reference(memory_format):
    x, dy = (t.contiguous(memory_format=memory_format) for t in batch((3, 4, 2)))
    layer = layer_of(3)
    assert_close(on_gpu(layer, x, dy), whole_batch(layer, x, dy), **EXACT)


@pytest.mark.parametrize("mean_over_std", [0, 1, 1e2, 1e4])
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
def test_float32_keeps_five_digits_however_far_the_mean(memory_format, mean_over_std):
    x, dy = (
        t.contiguous(memory_format=memory_format) for t in batch((3, 10, 7), torch.float32, mean=3 * mean_over_std)
    )
    layer = layer_of(3, torch.float32)
    assert_near(on_gpu(layer, x, dy), whole_batch(layer, x.double(), dy.double()), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    x, dy = batch((3, 10, 7), dtype, mean=0.0)
    layer = layer_of(3, torch.float32)
    assert_near(on_gpu(layer, x, dy), whole_batch(layer, x.double(), dy.double()), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"reduction": "gather"}, {"affine": False}], ids=str)
@pytest.mark.parametrize("n", [4, 1, 0], ids=["batch", "one-image", "empty"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_the_host_never_waits(options, n, masked):
    layer = SyncBatchNorm(3, **options).cuda()
    x = torch.randn(n, 3, 4, 4, device="cuda", requires_grad=True)
    mask = torch.ones(n, device="cuda", dtype=torch.bool) if masked else None
    dy = torch.ones_like(x)
    layer(x, mask=mask).backward(dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, mask=mask).backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
