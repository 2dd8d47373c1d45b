"""On a GPU: the same numbers as on the CPU, and no wait of the host. Needs one; elsewhere it is skipped."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from syncbn import SyncBatchNorm
from syncbn.kernels import native
from tests.op import kernel_steps
from tests.op.steps import EXACT, assert_near, batch, joined, layer_of, train_layer, whole_batch
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def on_gpu(layer, x, dy):
    answers = train_layer(0, copy.deepcopy(layer).cuda(), [x.cuda()], [dy.cuda()])
    return {name: on_cpu(value) for name, value in answers.items()}


def on_cpu(value):
    return {name: on_cpu(t) for name, t in value.items()} if isinstance(value, dict) else value.cpu()


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


def step_with(layer, x, residual, dy):
    """y, and the gradients of x, residual and the parameters."""
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    y = layer(x, residual)
    return y.detach(), *torch.autograd.grad(y, [x, residual, *layer.parameters()], dy)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_residual_and_relu(dtype, tolerance, memory_format, activation):
    x, dy = (t.contiguous(memory_format=memory_format) for t in batch((3, 10, 7), dtype))
    residual = batch((3, 10, 7), dtype, mean=0.0)[1]
    layer = layer_of(3, dtype, activation=activation)

    got = step_with(copy.deepcopy(layer).cuda(), x.cuda(), residual.cuda(), dy.cuda())

    want = step_with(layer.double(), x.double(), residual.double(), dy.double())
    assert got[0].is_contiguous(memory_format=memory_format)
    for ours, exact in zip(got, want, strict=True):
        assert_near(ours.cpu(), exact, tolerance)


# In bf16 a sum with the residual is rounded twice, which turns signs at the relu
NATIVE = [(case, torch.float32) for case in ("plain", "no-parameters", "relu", "residual+relu", "mask-of-images")]
NATIVE += [(case, torch.bfloat16) for case in ("plain", "relu")]


@pytest.mark.parametrize("case, dtype", NATIVE, ids=str)
@pytest.mark.parametrize("shape", [(12, 3), (16, 130, 4, 4), (12, 5, 7, 3), (0, 3, 4, 2)], ids=str)
def test_torchs_own_kernels_agree_with_eager(shape, case, dtype):
    inputs = kernel_steps.inputs(shape, dtype, mean=1.0, **kernel_steps.CASES[case])

    got = kernel_steps.step(native, **inputs)

    kernel_steps.assert_steps_agree(got, kernel_steps.in_float64(inputs), 1e-5 if dtype == torch.float32 else 4 * 2**-7)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("n", [4, 1, 0], ids=["batch", "one-image", "empty"])
def test_a_graph_of_a_training_step_is_replayed_on_new_inputs(n, options):
    eager = layer_of(3, torch.float32, **options).cuda()
    graphed = copy.deepcopy(eager)
    static = [torch.randn(n, 3, 4, 4, device="cuda") for _ in range(3)]
    # Compiles what is to be captured, and moves the buffers of a layer that is no more needed
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step_with(copy.deepcopy(eager), *static)
    torch.cuda.current_stream().wait_stream(aside)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step_with(graphed, *static)

    for _ in range(3):
        new = [1 + 2 * torch.randn_like(t) for t in static]
        for old, value in zip(static, new, strict=True):
            old.copy_(value)
        graph.replay()
        assert_close(outputs, step_with(eager, *new))
        assert_close(graphed.state_dict(), eager.state_dict())
    assert eager.num_batches_tracked == (3 if n else 0)


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
def test_what_merges_parts_on_one_stream_leaves_another_stream_and_a_graph_alone(memory_format):
    """Counters tell which program is the last: two launches at once must not share them."""
    layer = layer_of(64, torch.float32).cuda()
    given = [torch.randn(16, 64, 56, 56, device="cuda").to(memory_format=memory_format) for _ in range(3)]
    want = step_with(copy.deepcopy(layer), *given)
    streams = [torch.cuda.Stream() for _ in range(3)]
    graph, layers = torch.cuda.CUDAGraph(), [copy.deepcopy(layer) for _ in streams]
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        step_with(copy.deepcopy(layer), *given)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=streams[0]):
        of_graph = step_with(layers[0], *given)

    for _ in range(20):
        # The graph goes by the stream that it is replayed on
        with torch.cuda.stream(streams[1]):
            graph.replay()
        by_stream = []
        for stream, other in zip(streams[1:], layers[1:], strict=True):
            with torch.cuda.stream(stream):
                by_stream.append(step_with(other, *given))
        torch.cuda.synchronize()
        for got in (of_graph, *by_stream):
            assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
def test_more_than_2_to_the_31_elements(memory_format):
    free = torch.cuda.mem_get_info()[0]
    if free < 40e9:
        pytest.skip(f"needs 40 GB of free GPU memory, and there are {free / 1e9:.0f}")
    times, layer = 33, SyncBatchNorm(64, activation="relu").cuda()
    pieces = [torch.randn(1, 64, 1024, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    want = step_with(copy.deepcopy(layer), *pieces)

    # The same image often has its moments, and each of them its y and gradients
    y, *gradients = step_with(layer, *(often(t, times, memory_format) for t in pieces))

    assert y.numel() > 2**31
    for got, one in zip([y, *gradients[:2]], want, strict=False):
        for image in got.split(1):
            # All but the few whose sign at the relu another order of summation turns
            off = (image.float() - one.float()).abs() > 4 * 2**-7 * one.abs() + 1e-2
            assert off.sum() <= 1e-6 * one.numel()
    for got, one in zip(gradients[2:], want[3:], strict=True):
        assert_near(got, times * one, 1e-3)


def often(image, times, memory_format):
    whole = torch.empty(times, *image.shape[1:], dtype=image.dtype, device="cuda", memory_format=memory_format)
    return whole.copy_(image.expand_as(whole))


def train_on_gpu(rank, layer, xs, dys):
    return on_cpu(train_layer(rank, layer.cuda(), [x.cuda() for x in xs], [dy.cuda() for dy in dys]))


@pytest.mark.parametrize("split", [[4, 4], [7, 1], [8, 0], [3, 1, 0, 4]], ids=str)
@pytest.mark.parametrize("options", [{}, {"reduction": "gather"}, {"momentum": None}], ids=str)
def test_ranks_that_share_a_gpu_equal_the_whole_batch(options, split):
    x, dy = batch((3, 4, 2))
    layer = layer_of(3, **options)

    ranks = run_ranks(train_on_gpu, len(split), layer, x.split(split), dy.split(split), timeout_s=300)

    assert_close(joined(ranks), whole_batch(layer, x, dy), **EXACT)


@pytest.mark.parametrize("reduction", ["all_reduce", "gather"])
@pytest.mark.parametrize("split", [[5, 3], [8, 0]], ids=str)
def test_nccl_ranks_on_one_gpu_equal_the_whole_batch(tmp_path, split, reduction):
    version = torch.cuda.nccl.version()
    if version < (2, 30):
        pytest.skip(f"NCCL {version} has no NCCL_MULTI_RANK_GPU_ENABLE: two ranks on one GPU need 2.30")
    x, dy = batch((3, 4, 2))
    layer = layer_of(3, reduction=reduction)
    torch.save((layer, x.split(split), dy.split(split)), tmp_path / "given.pt")

    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={len(split)}", "-m", "tests.op.nccl_ranks"]
    environment = {**os.environ, "NCCL_MULTI_RANK_GPU_ENABLE": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(split))]
    assert_close(joined(ranks), whole_batch(layer, x, dy), **EXACT)
