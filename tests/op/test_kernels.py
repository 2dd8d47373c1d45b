"""Every make of the kernels against the eager ones in float64.

The GPU's run in Triton's interpreter here, compiled where there is a GPU; those in C where there is none.
"""

import os
import re
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn import kernels, sync_batch_norm
from syncbn.kernels import Affine, Running, eager
from tests.op.kernel_steps import CASES, DEVICE, LAST, MAKES, assert_steps_agree, in_float64, inputs, make, step
from tests.op.steps import EXACT, batch, joined, layer_of, train_layer, whole_batch
from tests.ranks import run_ranks

triton = pytest.importorskip("syncbn.kernels.triton", reason="needs Triton")

SHAPES = {
    "one-element": (1, 1),
    "rows": (5, 3),
    "no-rows": (0, 3),
    "no-images": (0, 3, 4, 2),
    "many-channels": (3, 130),
    "many-rows": (9001, 2),
    "more-rows-than-parts": (70_001, 1),
    "line": (4, 3, 5),
    "huge-line": (1, 1, 40_001),
    "planes": (3, 5, 7, 3),
    "small-planes": (9, 37, 2, 2),
    "large-planes": (2, 2, 70, 67),
    "volumes": (2, 3, 4, 5, 3),
}


@pytest.fixture(params=MAKES)
def kernel(request):
    return make(request.param)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6), (1, 3, 2, 2), (70, 3, 40, 40)], ids=str)
@pytest.mark.parametrize("kernel", ["cpu", "eager"])
def test_what_differs_between_images(kernel, shape, dtype, masked):
    x = inputs(shape, dtype)["x"].cpu()
    mask = torch.rand(shape[0], 1, *shape[2:]) < (0.5 if masked else 2)
    mask[0] = not masked  # an image without any value
    values, here = (t.double().unsqueeze(-1).flatten(2) for t in (x, mask))
    counts = here.sum(2)
    means = (values * here).sum(2) / counts.clamp(min=1)
    mean = (counts * means).sum(0) / counts.sum(0).clamp(min=1)

    for laid_out in (x, x.contiguous(memory_format=torch.channels_last)) if x.dim() == 4 else (x,):
        *apart, images = make(kernel).moments(laid_out, mask if masked else None, "row", per_image=True).between_images

        assert_close(torch.stack(apart), (counts * (means - mean).square()).sum(0), rtol=1e-4, atol=1e-5)
        assert images == (counts > 0).sum()


@pytest.mark.parametrize("case", ["plain", "residual+relu", "mask"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_agree_with_eager_in_float64(kernel, shape, case):
    case = inputs(shape, **CASES[case])

    got = step(kernel, **case)

    # aten adds up a little more in float32, and rounds what cancels where there is one value
    assert_steps_agree(got, in_float64(case), 1e-5 if kernel is not eager else 5e-5)
    assert got["y"].is_contiguous()
    assert got["dx"].is_contiguous()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["planes", "small-planes", "volumes", "no-images"])
def test_channels_last(kernel, name, case):
    shape = SHAPES[name]
    case = inputs(shape, **case)
    # What comes with x may lie otherwise
    case["x"] = case["x"].contiguous(memory_format=LAST[len(shape)])

    got = step(kernel, **case)

    assert_steps_agree(got, in_float64(case), 1e-5)
    assert all(got[name].is_contiguous(memory_format=LAST[len(shape)]) for name in ("y", "dx"))


def test_channels_last_of_a_line_and_what_has_gaps(kernel):
    case = inputs((4, 6, 10), residual=True, relu=True)
    line = case["x"].transpose(1, 2).contiguous().transpose(1, 2)
    gaps = case | {name: case[name][:, ::2, 1:9] for name in ("x", "dy", "residual")}
    gaps |= {name: case[name][::2] for name in ("weight", "bias")}

    got = step(kernel, **{**case, "x": line})

    assert got["y"].stride() == line.stride()
    assert_steps_agree(got, in_float64(case), 1e-5)
    assert_steps_agree(step(kernel, **gaps), in_float64(gaps), 1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(kernel, dtype, case):
    case = inputs((6, 5, 4, 3), dtype, mean=1.0, **case)

    got = step(kernel, **case)

    assert got["y"].dtype == got["dx"].dtype == dtype
    assert_steps_agree(got, in_float64(case), 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mean", [3e2, 3e4])
def test_float32_keeps_five_digits_however_far_the_mean(kernel, mean, memory_format):
    case = inputs((8, 3, 10, 7), mean=mean)
    case["x"] = case["x"].contiguous(memory_format=memory_format)

    assert_steps_agree(step(kernel, **case), in_float64(case), 1e-5)


@pytest.mark.parametrize("form", ["row", "message"])
def test_what_is_masked_is_no_measure_of_the_rest(kernel, form):
    case = inputs((20_000, 2), mean=3e4, mask="image")
    # The first tiles have nothing that counts, and the values there are far off
    case["mask"] = (torch.arange(20_000, device=DEVICE) >= 17_000).view(-1, 1)
    case["x"][:17_000] = 0

    got = step(kernel, **case, form=form)

    want = in_float64(case, form)
    for name in "mean", "var", "count":
        assert_close(got[name], want[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(30_001, 2), (2, 3, 70, 67)], ids=str)
def test_every_run_has_the_same_bits(kernel, shape):
    case = inputs(shape, torch.float32, relu=True)
    assert_close(step(kernel, **case), step(kernel, **case), rtol=0, atol=0)


def test_offsets_of_64_bits():
    case = inputs((40, 5, 12, 11), residual=True, relu=True, mask="element")
    want = step(triton, **case)
    triton.plan.plan_of.cache_clear()
    try:
        with patch.object(triton.plan, "INT32", 0):
            assert_close(step(triton, **case), want, rtol=0, atol=0)
    finally:
        triton.plan.plan_of.cache_clear()


@pytest.mark.parametrize("ranks", [1, 3, 16, 300])
def test_statistics_of_gathered_rows(kernel, ranks):
    x, _ = batch((5, 4), n=2 * ranks, mean=3e6)
    rows = torch.stack([eager.moments(part, None, "row").packed for part in x.split(2)])
    rows[ranks // 2] *= ranks == 1  # a rank without data
    _, want = eager.normalize(x[:1], rows, Affine(eps=0.1))

    _, got = kernel.normalize(x[:1].to(DEVICE), rows.to(DEVICE), Affine(eps=0.1))

    # Of 16 digits the mean takes 6
    assert_close(got.cpu(), want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("apart", [False, True], ids=["with-normalize", "apart"])
@pytest.mark.parametrize("form", ["message", "row"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None], ids=str)
@pytest.mark.parametrize("channels", [3, 2500])
@pytest.mark.parametrize("n", [8, 1, 0], ids=["batch", "one-value", "empty"])
def test_running_buffers(kernel, n, channels, momentum, form, apart):
    buffers = [torch.rand(channels), torch.rand(channels), torch.tensor(4)]
    got = [t.clone().to(DEVICE) for t in buffers]
    for mean in 5.0, 7.0:
        x = batch((channels,), n=n, mean=mean)[0]
        packed = eager.moments(x, None, form).packed
        shared = packed if form == "message" else packed[None]
        eager.normalize(x, shared, Affine(), running=Running(*buffers, momentum))
        versions = [t._version for t in got]
        running = Running(*got, momentum)
        _, stats = kernel.normalize(x.to(DEVICE), shared.to(DEVICE), Affine(), None, None if apart else running)
        if apart:
            kernel.update_running(running, stats)
        assert all(t._version > old for t, old in zip(got, versions, strict=True))

    assert_close([t.cpu() for t in got], buffers)
    assert got[2].item() == (6 if n else 4)


@pytest.mark.parametrize("residual", [False, True])
def test_what_is_not_a_number_is_not_hidden_by_relu(kernel, residual):
    case = inputs((4, 2, 3), relu=True, residual=residual)
    case["x"][1, 0, 1] = torch.nan

    got = step(kernel, **case)

    for name in "y", "dx":
        assert got[name][:, 0].isnan().all()
        assert got[name][:, 1].isfinite().all()
    assert got["var"][0].isnan()
    assert got["var"][1].isfinite()


@pytest.mark.parametrize(("relu", "residual", "kept"), [(False, False, "x"), (True, False, "x"), (True, True, "xy")])
@pytest.mark.parametrize("kernel", [name for name in MAKES if name != "eager"], indirect=True)
def test_backward_keeps_x_and_y_only_where_the_relu_of_a_sum_needs_it(kernel, relu, residual, kept):
    x = torch.randn(4, 3, 6, device=DEVICE, requires_grad=True)
    r = torch.randn_like(x) if residual else None
    saved = []
    with (
        patch.object(kernels, "choose", lambda x: kernel),
        torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t),
    ):
        y, _ = sync_batch_norm(x, residual=r, activation="relu" if relu else None)
    large = {t.data_ptr() for t in saved if t.numel() >= x.numel()}
    assert large == {t.data_ptr() for t in ([x, y] if kept == "xy" else [x])}


def on_make(rank, name, *args):
    with patch.object(kernels, "choose", lambda x: make(name)):
        return train_layer(rank, *args)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for CPU tensors; test_gpu.py has the layer on a GPU")
@pytest.mark.parametrize("reduction", ["all_reduce", "gather"])
@pytest.mark.parametrize("split", [[4, 4], [3, 1, 0, 4]], ids=str)
def test_ranks_on_any_make_equal_the_whole_batch(kernel, split, reduction):
    x, dy = batch((3, 4, 2))
    layer = layer_of(3, reduction=reduction)

    ranks = run_ranks(on_make, len(split), kernel.__name__.rpartition(".")[2], layer, x.split(split), dy.split(split))

    assert_close(joined(ranks), whole_batch(layer, x, dy), **EXACT)


class Fails:
    """A kernel that does not compile."""

    def __init__(self, name):
        self.__name__ = name

    def __getitem__(self, grid):
        raise RuntimeError(f"{self.__name__} does not compile")


@pytest.mark.parametrize("name", ["moments", "normalize", "grad_sums", "grad_input", "merge", "update_running"])
def test_a_kernel_that_does_not_compile_is_found_before_training(name):
    triton.probe(torch.device(DEVICE))
    owner = next(room for room in (triton.forward, triton.backward, triton.statistics) if hasattr(room, name))
    with patch.object(owner, name, Fails(name)), pytest.raises(RuntimeError, match=f"{name} does not compile"):
        triton.probe(torch.device(DEVICE))


def test_where_triton_fails_torchs_own_kernels_are_taken_with_a_warning():
    with (
        patch.object(triton, "probe", side_effect=RuntimeError("no compiler")),
        pytest.warns(UserWarning, match="Triton does not work here, so torch's own kernels are used: no compiler"),
    ):
        assert kernels._for_cuda.__wrapped__() is kernels.native


class Recorded(TorchDispatchMode):
    """The operators that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls.append((operator, args))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eager_gives_saved_statistics_which_cuda_asserts_to_be_there(dtype, case):
    """native_batch_norm_backward(save_mean=None) is an internal assert on CUDA, of torch 2.11 and 2.15."""
    with Recorded() as recorded:
        step(eager, **inputs((4, 3, 5, 2), dtype, **case))

    given = [args for operator, args in recorded.calls if operator.name() == "aten::native_batch_norm_backward"]
    assert len(given) >= 2
    assert all(isinstance(args[place], torch.Tensor) for args in given for place in (5, 6))


@pytest.mark.parametrize(
    "dtype, accumulated", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)], ids=str
)
def test_torchs_own_kernels_are_given_statistics_as_they_accumulate(dtype, accumulated):
    """They refuse others; there is no GPU to run them on, so it is looked at what they are given."""
    case, given = inputs((4, 3, 5), dtype, relu=True), []
    ours = {
        "batch_norm_stats": lambda x, eps: torch.var_mean(x.to(accumulated), (0, 2))[::-1],
        "batch_norm_elemt": lambda x, weight, bias, *vectors: given.extend(vectors[:2]) or torch.zeros_like(x),
        "batch_norm_backward_reduce": lambda dy, x, *vectors: given.extend(vectors[:2]) or [vectors[0]] * 4,
        "batch_norm_backward_elemt": lambda dy, x, *vectors: given.extend([*vectors[:2], *vectors[3:5]]) or dy,
    }
    with ExitStack() as stack:
        for name, operator in ours.items():
            stack.enter_context(patch.object(torch, name, operator))
        step(kernels.native, **case)

    assert [t.dtype for t in given] == [accumulated] * 8


def test_images_share_the_programs_that_a_pass_has():
    """Each with as many parts as the whole batch, and those merged by one program, took 120 us in place of 5."""
    last = torch.empty(8, 64, 112, 112, device="meta").to(memory_format=torch.channels_last)
    for x in last, last.contiguous():
        with patch.object(triton.plan, "multiprocessors", lambda device: 132):
            like = x.shape, x.stride(), torch.bfloat16, torch.device(DEVICE)
            plan, whole = triton.plan.plan_of.__wrapped__(*like, 8), triton.plan.plan_of.__wrapped__(*like, 0)
        assert plan.moments.groups == 8
        assert plan.moments.programs <= max(whole.moments.programs, 8 * plan.blocks)


def test_no_wave_of_programs_is_nearly_empty():
    """Of all that run at once each has as many tiles as the one with most, or one less."""
    for images in range(1, 300, 7):
        for channels in 64, 256, 2048:
            x = torch.empty(images, channels, 14, 14, device="meta").to(memory_format=torch.channels_last)
            with patch.object(triton.plan, "multiprocessors", lambda device: 132):
                plan = triton.plan.plan_of.__wrapped__(x.shape, x.stride(), torch.bfloat16, torch.device(DEVICE), 0)
            resident = {name: count * 132 for name, count in triton.plan.RESIDENT.items()}
            assert plan.normalize + 1 <= resident["normalize"]
            assert plan.grad_input <= resident["grad_input"]
            assert plan.moments.programs <= resident["moments"]
            assert plan.sums.programs <= resident["grad_sums"]


def test_plans_are_kept_for_so_many_shapes_and_no_more():
    assert triton.plan.plan_of.cache_info().maxsize == triton.plan.SHAPES


@pytest.mark.parametrize("tiles, groups", [(1, 1), (4, 6)])
def test_parts_are_merged_in_two_levels_by_whoever_is_last(tiles, groups):
    """In the interpreter that is the program of the last number; the groups are not all of one size."""
    case = inputs((10, 2, tiles * 4096 - 17), mean=50.0)
    with patch.object(triton.plan, "multiprocessors", lambda device: 200):
        triton.plan.plan_of.cache_clear()
        _, plan = triton.planned(case["x"])
        got = step(triton, **case)
        triton.plan.plan_of.cache_clear()

    assert plan.moments.groups == groups
    assert groups == 1 or plan.moments.parts % plan.moments.size != 0
    assert_steps_agree(got, in_float64(case), 1e-5)
    assert all((counters == 0).all() for _, counters in triton.launch.kept_scratch.values())


@contextmanager
def programs_in_the_order(order):
    """Within it Triton's interpreter runs the programs of a launch in another order: order(number, of how many)."""
    from triton.runtime.interpreter import interpreter_builder as interpreter

    def other(x, y, z):
        return real(order(x, interpreter.grid_dim[0]), y, z)

    real = interpreter.set_grid_idx
    with patch.object(interpreter, "set_grid_idx", other):
        yield


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs programs in whatever order it likes")
@pytest.mark.plain("groups-of-images-turned")
@pytest.mark.parametrize("order", [lambda x, n: n - 1 - x, lambda x, n: (x + n // 3) % n], ids=["backwards", "turned"])
@pytest.mark.parametrize("images", [4, 12], ids=["groups-of-images", "groups"])
def test_the_order_in_which_programs_finish_changes_no_bit(images, order):
    case = inputs((images, 1, 3 * 4096 - 17), mean=50.0, relu=True)
    with patch.object(triton.plan, "multiprocessors", lambda device: 200):
        triton.plan.plan_of.cache_clear()
        want = step(triton, **case)
        with programs_in_the_order(order):
            got = step(triton, **case)
        triton.plan.plan_of.cache_clear()

    assert_close(got, want, rtol=0, atol=0)


def test_between_the_parts_of_one_image_there_is_no_other_image():
    x = inputs((1, 1, 40 * 4096))["x"]
    with patch.object(triton.plan, "multiprocessors", lambda device: 200):
        triton.plan.plan_of.cache_clear()
        assert triton.planned(x, 1)[1].moments == (40, 40, 1, 40)
        between = triton.moments(x, None, "row", per_image=True).between_images
        triton.plan.plan_of.cache_clear()

    assert between.tolist() == [0.0, 1.0]


# Registers, and instructions of the loop over tiles, of a pass: as built for Hopper, with some room
BUDGET = {"moments": (80, 350), "normalize": (80, 160), "grad_sums": (128, 210), "grad_input": (128, 280)}


def compile_kernels(*words):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_ALWAYS_COMPILE": "1"}
    command = [sys.executable, "-m", "tests.op.compile_kernels", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.ci
@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu_within_its_budget():
    done = compile_kernels()
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.partition("\n\n")[0].splitlines()]
    passes = [(name, dict(word.split(":") for word in words if ":" in word), words) for name, *words in lines]
    assert {name for name, *_ in passes} == BUDGET.keys()
    assert len(passes) > 20
    for name, used, words in passes:
        registers, instructions = BUDGET[name]
        assert int(used["REG"]) <= registers, (name, used)
        assert int(used["TILE"]) <= instructions, (name, used)
        assert used["SPILLED"] == used["LOCAL"] == "0", (name, used)
        assert "v4.b32" in words, (name, words)  # 16 bytes at a time


@pytest.mark.slow
def test_every_variant_compiles_and_another_batch_is_no_other_variant():
    done = compile_kernels("--all")
    assert done.returncode == 0, done.stderr
    assert re.search(r"[5-9]\d\d variants compiled, 0 failed; 0 more for other batches", done.stdout), done.stdout
