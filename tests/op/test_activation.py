"""A layer with a relu and a residual equals batch norm, sum and relu in a row: output, gradients, buffers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from syncbn import LazySyncBatchNorm, SyncBatchNorm, reference, sync_batch_norm
from tests.cases import SHAPES, SPLITS
from tests.op.steps import EXACT, assert_near, batch, layer_of
from tests.ranks import run_ranks

FORMS = {"relu": (True, False), "residual": (False, True), "residual+relu": (True, True)}


def of_whole_batch(layer, x, r, dy):
    """y and every gradient of relu(batch norm + r) by reference.py, in one process."""
    x, r = x.clone().requires_grad_(), None if r is None else r.clone().requires_grad_()
    weight, bias = (p.detach().to(x.dtype).requires_grad_() for p in (layer.weight, layer.bias))
    y = reference.batch_norm(x, weight, bias, layer.eps)
    y = y if r is None else y + r
    y = F.relu(y) if layer.activation else y
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "weight": weight.grad, "bias": bias.grad} | (
        {} if r is None else {"dresidual": r.grad}
    )


def on_rank(rank, layer, xs, rs, dys):
    x, r = xs[rank].clone().requires_grad_(), None if rs is None else rs[rank].clone().requires_grad_()
    y = layer.train()(x, r)
    y.backward(dys[rank])
    gradients = {"y": y.detach(), "dx": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    return gradients | ({} if r is None else {"dresidual": r.grad})


def joined(ranks):
    together = {name: torch.cat([r[name] for r in ranks]) for name in ("y", "dx", "dresidual") if name in ranks[0]}
    return together | {name: sum(r[name] for r in ranks) for name in ("weight", "bias")}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ranks_together_equal_the_whole_batch(shape, split, form):
    relu, with_residual = form
    x, dy = batch(shape)
    r = torch.randn(x.shape, dtype=x.dtype) if with_residual else None
    layer = layer_of(shape[0], activation="relu" if relu else None)

    ranks = run_ranks(on_rank, len(split), layer, x.split(split), r if r is None else r.split(split), dy.split(split))

    assert_close(joined(ranks), of_whole_batch(layer, x, r, dy), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_lower_precisions(dtype, memory_format):
    x, dy = (t.to(dtype).contiguous(memory_format=memory_format) for t in batch((3, 4, 2), mean=1.0))
    r = torch.randn(x.shape).to(dtype)
    layer = layer_of(3, torch.float32)
    # Near zero, rounding decides what the relu lets through: there no gradient comes in
    before_relu = of_whole_batch(layer, x.double(), r.double(), dy.double())["y"]
    dy = dy * (before_relu.abs() > 0.05)
    layer.activation = "relu"

    got = on_rank(0, layer, [x], [r], [dy])

    assert got["y"].is_contiguous(memory_format=memory_format)
    want = of_whole_batch(layer, x.double(), r.double(), dy.double())
    assert_near(got, want, max(8 * torch.finfo(dtype).eps, 1e-5))


def test_a_rank_may_have_a_residual_where_another_has_none():
    x, dy = batch((3, 4, 2))
    r = torch.randn(8, 3, 4, 2, dtype=x.dtype)
    r[5:] = 0
    layer = layer_of(3, activation="relu")

    first, second = run_ranks(mixed, 2, layer, x.split([5, 3]), r[:5], dy.split([5, 3]))

    want = of_whole_batch(layer, x, r, dy)
    for name in "y", "dx":
        assert_close(torch.cat([first[name], second[name]]), want[name], **EXACT)
    assert_close(first["dresidual"], want["dresidual"][:5], **EXACT)


def mixed(rank, layer, xs, r, dys):
    return on_rank(rank, layer, xs, [r] if rank == 0 else None, dys)


def test_an_activation_may_be_of_one_call():
    x, layer = torch.randn(4, 3, 5), SyncBatchNorm(3)
    for mode in layer.train(), layer.eval():
        assert_close(mode(x, activation="relu"), F.relu(mode(x)))
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        layer(x, activation="tanh")


@pytest.mark.parametrize("kind", [SyncBatchNorm, LazySyncBatchNorm])
def test_eval_adds_and_cuts_too(kind):
    x, r = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    layer = kind(activation="relu") if kind is LazySyncBatchNorm else kind(3, activation="relu")
    plain = nn.BatchNorm1d(3)
    assert_close(layer(x, r), F.relu(plain(x) + r))
    assert_close(layer.eval()(x, r), F.relu(plain.eval()(x) + r))
    assert "activation='relu'" in repr(layer)


def test_a_mask_beside_them():
    x, r = batch((3, 4))[0].split([5, 3]), torch.randn(8, 3, 4).double().split([5, 3])
    mask = (torch.rand(8, generator=torch.Generator().manual_seed(1)) < 0.6).split([5, 3])
    for y, before in run_ranks(seeded, 2, x, r, mask):
        assert_close(y, F.relu(before), **EXACT)


def seeded(rank, xs, rs, masks):
    torch.manual_seed(0)
    layer, plain = layer_of(3, activation="relu"), layer_of(3)
    plain.load_state_dict(layer.state_dict())
    return layer(xs[rank], rs[rank], masks[rank]), plain(xs[rank], mask=masks[rank]) + rs[rank]


def normalised(x, r, weight, bias):
    return sync_batch_norm(x, weight, bias, residual=r, activation="relu", eps=0.01)[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_of_gradients(world_size):
    assert run_ranks(checked_numerically, world_size) == [(True, True)] * world_size


def checked_numerically(rank):
    generator = torch.Generator().manual_seed(3)
    x, r = (torch.randn(3, 2, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    weight, bias = (torch.rand(2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    # Every rank the same batch: then a rank's share of a gradient is that of the whole, over their number
    first = torch.autograd.gradcheck(lambda r: normalised(x, r, weight, bias), (r,))
    y = normalised(x, r, weight, bias)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    second = torch.autograd.grad(dx.square().sum(), (x, r, weight))
    whole = [t.detach().clone().requires_grad_() for t in (x, r, weight)]
    z = F.relu(reference.batch_norm(whole[0], whole[2], bias, 0.01) + whole[1])
    (dz,) = torch.autograd.grad(z.pow(3).sum(), whole[0], create_graph=True)
    want = torch.autograd.grad(dz.square().sum(), whole)
    return first, all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(second, want, strict=True))


def compiled(rank, backend, layer, *args):
    torch._dynamo.reset()
    layer.compile(fullgraph=True, backend=backend)
    return on_rank(rank, layer, *args)


@pytest.mark.plain("residual-aot_eager")
@pytest.mark.parametrize(
    ("form", "backend"),
    [*((form, "aot_eager") for form in FORMS), ("residual+relu", "inductor")],
)
def test_compiled(form, backend):
    relu, with_residual = FORMS[form]
    x, dy = batch((3, 4, 2))
    r = torch.randn(x.shape, dtype=x.dtype) if with_residual else None
    layer = layer_of(3, activation="relu" if relu else None)
    split = [6, 2]
    shares = x.split(split), r if r is None else r.split(split), dy.split(split)

    ranks = run_ranks(compiled, 2, backend, layer, *shares, timeout_s=300)

    assert_close(joined(ranks), of_whole_batch(layer, x, r, dy), **EXACT)


def refused(rank, xs, r):
    layer = SyncBatchNorm(3)
    with pytest.raises(ValueError, match=r"residual|refused") as raised:
        layer(xs[rank], r if rank == 0 else None)
    return str(raised.value), layer.num_batches_tracked.item()


@pytest.mark.parametrize("shape", [(5, 3, 1), (5, 4, 4), (5, 3)], ids=str)
def test_a_residual_of_another_shape_is_an_error_on_every_rank(shape):
    first, second = run_ranks(refused, 2, torch.randn(8, 3, 4).split([5, 3]), torch.zeros(shape))
    assert first == (f"x has shape (5, 3, 4) but residual {shape}: they must be the same", 0)
    assert "another rank of the group refused its input" in second[0]


def test_bad_choices():
    with pytest.raises(ValueError, match="activation is 'gelu': it must be 'relu' or None"):
        SyncBatchNorm(3, activation="gelu")
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        sync_batch_norm(torch.randn(4, 3), activation="gelu")


def test_an_output_that_backward_needs_is_not_to_be_overwritten():
    layer = SyncBatchNorm(3, activation="relu")
    x = torch.randn(4, 3, requires_grad=True)
    y = layer(x, residual=x)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
