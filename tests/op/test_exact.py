"""Ranks together are one batch: output, every gradient and every buffer, against reference.py."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from syncbn import SyncBatchNorm, reference, sync_batch_norm
from tests.cases import SHAPES, SPLITS
from tests.messages import recorded
from tests.op.steps import EXACT, assert_near, batch, joined, layer_of, train_layer, whole_batch
from tests.ranks import run_ranks

REDUCTIONS = ["all_reduce", "gather"]
LAYOUTS = {
    "NCHW": ((3, 10, 7), torch.contiguous_format),
    "NHWC": ((3, 10, 7), torch.channels_last),
    "NCDHW": ((3, 4, 5, 3), torch.contiguous_format),
    "NDHWC": ((3, 4, 5, 3), torch.channels_last_3d),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ranks_together_equal_the_whole_batch(split, shape, reduction):
    x, dy = batch(shape)
    layer = layer_of(shape[0], reduction=reduction)

    ranks = run_ranks(train_layer, len(split), layer, x.split(split), dy.split(split))

    assert_close(joined(ranks), whole_batch(layer, x, dy), **EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_lone_process_is_plain_batch_norm(shape, reduction):
    x, dy = batch(shape)
    layer = layer_of(shape[0], reduction=reduction)

    assert_close(train_layer(0, layer, [x], [dy]), whole_batch(layer, x, dy), **EXACT)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1)], ids=["NC", "1x1"])
def test_one_value_per_channel_on_a_rank(shape):
    x, dy = batch(shape, n=2)
    layer = layer_of(3)

    ranks = run_ranks(train_layer, 2, layer, x.split(1), dy.split(1))

    assert_close(joined(ranks), whole_batch(layer, x, dy), **EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.7, "eps": 0.1},
        {"affine": False, "track_running_stats": False, "reduction": "gather"},
    ],
    ids=str,
)
def test_options_of_batch_norm(options):
    x, dy = batch((3, 4, 2))
    layer = layer_of(3, **options)

    ranks = run_ranks(train_layer, 2, layer, x.split([7, 1]), dy.split([7, 1]))

    assert_close(joined(ranks), whole_batch(layer, x, dy), **EXACT)


def test_ranks_may_differ_in_image_size():
    x, dy = batch((3, 12))
    xs = [x[:, :, :8].reshape(8, 3, 4, 2), x[:, :, 8:].reshape(8, 3, 2, 2)]
    dys = [dy[:, :, :8].reshape(8, 3, 4, 2), dy[:, :, 8:].reshape(8, 3, 2, 2)]
    layer = layer_of(3)

    ranks = run_ranks(train_layer, 2, layer, xs, dys)

    want = whole_batch(layer, x, dy)
    for name in "y", "dx":
        assert_close(torch.cat([r[name].flatten(2) for r in ranks], dim=2), want[name], **EXACT)
    assert_close(
        {n: ranks[0]["gradients"][n] + ranks[1]["gradients"][n] for n in ("weight", "bias")}, want["gradients"]
    )
    assert_close(ranks[1]["buffers"], want["buffers"], **EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_step_in_which_no_rank_has_data_leaves_the_buffers(dtype, reduction):
    x, dy = batch((3, 4, 2), dtype, n=0)
    layer = layer_of(3, torch.float32, reduction=reduction)

    for rank in run_ranks(train_layer, 2, layer, [x, x], [dy, dy]):
        want = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "num_batches_tracked": torch.tensor(0)}
        assert_close(rank["buffers"], want)
        assert rank["y"].shape == rank["dx"].shape == x.shape
        assert not any(gradient.any() for gradient in rank["gradients"].values())


@pytest.mark.parametrize("mean_over_std", [0, 1, 1e2, 1e4])
@pytest.mark.parametrize(("shape", "memory_format"), LAYOUTS.values(), ids=LAYOUTS)
def test_float32_keeps_five_digits_however_far_the_mean(shape, memory_format, mean_over_std):
    x, dy = batch(shape, torch.float32, mean=3 * mean_over_std)
    x, dy = (t.contiguous(memory_format=memory_format) for t in (x, dy))
    layer = layer_of(3, torch.float32)

    ranks = run_ranks(train_layer, 2, layer, x.split([7, 1]), dy.split([7, 1]))

    assert all(r[name].is_contiguous(memory_format=memory_format) for r in ranks for name in ("y", "dx"))
    assert_near(joined(ranks), whole_batch(layer, x.double(), dy.double()), 1e-5)


def test_gathered_moments_are_right_where_a_sum_of_squares_is_not():
    x, dy = batch((3, 10, 7), mean=3e8)
    shift = 3e8  # exact in float64, so that what is wanted can be computed about zero
    layer = layer_of(3, reduction="gather", eps=0.0)

    gathered = joined(run_ranks(train_layer, 2, layer, x.split([5, 3]), dy.split([5, 3])))

    want = whole_batch(layer, x - shift, dy)
    want["buffers"]["running_mean"] += 0.1 * shift
    assert_near(gathered, want, 1e-7)  # x itself is rounded to 6e-8 of its standard deviation
    layer.reduction = "all_reduce"
    summed = joined(run_ranks(train_layer, 2, layer, x.split([5, 3]), dy.split([5, 3])))
    assert not torch.allclose(summed["y"], want["y"], rtol=0, atol=0.01)


@pytest.mark.parametrize("mean_over_std", [1e4, 1e6])
def test_gathered_moments_of_float32(mean_over_std):
    x, dy = batch((3, 10, 7), torch.float32, mean=3 * mean_over_std)
    layer = layer_of(3, torch.float32, reduction="gather")

    ranks = run_ranks(train_layer, 2, layer, x.split([5, 3]), dy.split([5, 3]))

    assert_near(joined(ranks), whole_batch(layer, x.double(), dy.double()), 1e-5)


def without_all_reduce(rank, *args):
    """In an all_reduce the backend would have an order of its own."""
    with recorded() as sent:
        answers = train_layer(rank, *args)
    assert {name for name, *_ in sent} == {"all_gather"}
    return answers


def test_gathered_moments_are_the_same_bits_in_every_run_and_use_no_all_reduce():
    x, dy = batch((3, 10, 7), torch.float32)
    layer = layer_of(3, torch.float32, reduction="gather")
    split = [3, 1, 0, 4]

    first, second = (run_ranks(without_all_reduce, 4, layer, x.split(split), dy.split(split)) for _ in range(2))

    assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32-parameters", "half-parameters"])
def test_lower_precisions_round_only_their_own_output(dtype, memory_format, parameters):
    x, dy = (t.to(dtype).contiguous(memory_format=memory_format) for t in batch((3, 4, 2)))
    layer = layer_of(3, dtype=torch.float32).to(parameters or dtype)

    ranks = run_ranks(train_layer, 2, layer, x.split([7, 1]), dy.split([7, 1]))

    assert all(r[name].is_contiguous(memory_format=memory_format) for r in ranks for name in ("y", "dx"))
    assert all(r[name].dtype == dtype for r in ranks for name in ("y", "dx"))
    assert all(r["buffers"][name].dtype == torch.float32 for r in ranks for name in ("running_mean", "running_var"))
    want = whole_batch(layer, x.double(), dy.double())
    # dx is a difference of terms near 1: two roundings of those, not of dx itself
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * max(torch.finfo(dtype).eps, 1e-6)}
    got = joined(ranks)
    assert_close(got.pop("buffers"), want.pop("buffers"), check_dtype=False, rtol=1e-6, atol=1e-6)
    assert_close(got, want, check_dtype=False, **tolerance)


def test_an_empty_rank_in_half_precision():
    x, dy = batch((3, 4, 2), torch.bfloat16)
    layer = layer_of(3, torch.float32)

    ranks = run_ranks(train_layer, 2, layer, x.split([8, 0]), dy.split([8, 0]))

    assert_near(joined(ranks), whole_batch(layer, x.double(), dy.double()), 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2**24 + 77, 1), torch.float32),
        ((1, 1, 2**24 + 77), torch.float32),
        ((1, 1, 4097, 4099), torch.float32),
        ((1, 2, 4097, 2049), torch.bfloat16),
        ((70_000, 2), torch.float16),
    ],
    ids=str,
)
def test_more_values_than_the_dtype_can_count(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (2 + torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
    y, moments = sync_batch_norm(x, weight, bias)
    dweight, dbias = torch.autograd.grad(y, [weight, bias], y.detach())

    count = x.numel() // shape[1]
    assert moments.count == count
    values = x.detach().double().transpose(0, 1).flatten(1)
    assert_close(moments.mean, values.mean(1), rtol=0, atol=1e-6)
    assert_close(moments.var, values.var(1, correction=0), rtol=1e-5, atol=0)
    rounding = torch.finfo(dtype).eps
    assert_close(dweight / count, torch.ones_like(dweight), rtol=1e-5 + rounding, atol=0)
    assert_close(dbias / count, torch.zeros_like(dbias), rtol=0, atol=1e-6 + rounding)


def test_input_that_is_not_contiguous():
    x, dy = batch((6, 4, 5))
    layer = layer_of(3)
    views = [lambda t: t[:, ::2, :, 1:4], lambda t: t[:, ::2, :, 1:4].transpose(2, 3), lambda t: t[:, :3].flip(3)]
    for view in views:
        xs, dys = view(x).split([6, 2]), view(dy).split([6, 2])
        ranks = run_ranks(train_layer, 2, layer, xs, dys)
        assert_close(joined(ranks), whole_batch(layer, view(x), view(dy)), **EXACT)


def test_a_gradient_of_another_memory_format():
    x, dy = batch((3, 4, 2))
    layer = layer_of(3)
    xs = x.contiguous(memory_format=torch.channels_last).split([6, 2])

    ranks = run_ranks(train_layer, 2, layer, xs, [dy[:6], torch.ones(()).double().expand(2, 3, 4, 2)])

    assert_close(joined(ranks), whole_batch(layer, x, torch.cat([dy[:6], torch.ones(2, 3, 4, 2)])), **EXACT)


def masked_whole_batch(layer, x, dy, mask):
    """y and gradients where mean and var are of the elements under mask, by autograd over plain operators."""
    x = x.clone().requires_grad_()
    weight, bias = (p.detach().clone().requires_grad_() for p in layer.parameters())
    values = x.movedim(1, -1)[mask.movedim(1, -1).expand(x.movedim(1, -1)[..., :1].shape)[..., 0]]
    mean, var = (v.view(1, -1, *[1] * (x.dim() - 2)) for v in (values.mean(0), values.var(0, correction=0)))
    shape = mean.shape
    y = (x - mean) / (var + layer.eps).sqrt() * weight.view(shape) + bias.view(shape)
    y.backward(dy)
    start = torch.zeros(x.size(1)).double(), torch.ones(x.size(1)).double()
    mean, var = reference.running(values.detach(), *start)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "gradients": {"weight": weight.grad, "bias": bias.grad},
        "buffers": {"running_mean": mean, "running_var": var, "num_batches_tracked": torch.tensor(1)},
    }


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("per", ["element", "sample"])
def test_only_elements_under_the_mask_count(split, shape, per):
    x, dy = batch(shape)
    layer = layer_of(shape[0])
    spatial = shape[1:] if per == "element" else ()
    mask = torch.rand(8, 1, *spatial, generator=torch.Generator().manual_seed(2)) < 0.7
    want = masked_whole_batch(layer, x, dy, mask.view(8, 1, *spatial, *[1] * (len(shape) - 1 - len(spatial))))
    if per == "sample":
        mask = mask.flatten()

    ranks = run_ranks(train_layer, len(split), layer, x.split(split), dy.split(split), mask.split(split))

    assert_close(joined(ranks), want, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_in_lower_precision(dtype):
    x, dy = batch((3, 4, 2), dtype, mean=0.0)
    layer = layer_of(3, torch.float32)
    mask = torch.rand(8, 1, 4, 2, generator=torch.Generator().manual_seed(1)) < 0.6

    ranks = run_ranks(train_layer, 2, layer, x.split([5, 3]), dy.split([5, 3]), mask.split([5, 3]))

    want = masked_whole_batch(layer.double(), x.double(), dy.double(), mask)
    assert_near(joined(ranks), want, 4 * max(torch.finfo(dtype).eps, 1e-6))


def cumulative_average(rank, xs):
    layer = SyncBatchNorm(3, momentum=None, dtype=torch.float64)
    for x in xs:
        layer(x.chunk(2)[rank])
    return layer.running_mean, layer.running_var


def test_momentum_none_is_the_average_over_batches():
    xs = [batch((3, 4), n=n)[0] for n in (4, 6, 8)]
    each = [reference.running(x, torch.zeros(3).double(), torch.zeros(3).double(), momentum=1.0) for x in xs]

    for mean, var in run_ranks(cumulative_average, 2, xs):
        assert_close(mean, sum(m for m, _ in each) / 3, **EXACT)
        assert_close(var, sum(v for _, v in each) / 3, **EXACT)


def under_autocast(rank, xs, dys):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm(4), nn.ReLU())
    x = xs[rank].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    y.backward(dys[rank][:, :1].expand_as(y).to(y.dtype))
    return y.detach(), x.grad, net[1].running_var.clone(), net[1].weight.grad


def test_under_autocast():
    x, dy = batch((3, 4, 2), torch.float32, mean=0.0)

    alone = under_autocast(0, [x.clone()], [dy])
    first, second = run_ranks(under_autocast, 2, x.split([5, 3]), dy.split([5, 3]))

    assert first[0].dtype == torch.bfloat16
    assert first[1].dtype == first[2].dtype == torch.float32
    rounding = 4 * torch.finfo(torch.bfloat16).eps
    assert_near(torch.cat([first[0], second[0]]), alone[0], rounding)
    assert_near(torch.cat([first[1], second[1]]), alone[1], rounding)
    assert_close(second[2], alone[2])
    assert_near(first[3] + second[3], alone[3], rounding)


def test_eval_uses_the_running_buffers():
    x, _ = batch((3, 4, 2))
    layer = layer_of(3).eval()
    layer.running_mean.fill_(2)
    layer.running_var.fill_(9)
    plain = nn.BatchNorm2d(3, dtype=torch.float64).eval()
    plain.load_state_dict(layer.state_dict())

    assert_close(layer(x), plain(x))
    assert_close(layer.half()(x.half()), plain(x).half(), atol=1e-2, rtol=1e-2)
