"""What torch can do to a function, it can do to the layer: batches of gradients, torch.func, vmap, forward-mode AD."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.testing import assert_close

from syncbn import SyncBatchNorm, collectives, reference
from tests.messages import recorded
from tests.op.steps import EXACT, batch, layer_of
from tests.ranks import run_ranks

# Each takes a function of x [N, C, L] and returns tensors of which dimension -3 is N


def gradients_in_a_batch(fn, x):
    x = x.requires_grad_()
    y = fn(x)
    return torch.autograd.grad(y, x, torch.stack([y.sin(), y.cos(), y * 0]).detach(), is_grads_batched=True)


def gradients_of_a_batch_of_gradients(fn, x):
    x = x.requires_grad_()
    y = fn(x)
    vectors = torch.stack([y.sin(), y.cos()]).detach()
    (dx,) = torch.autograd.grad(y, x, vectors, is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(dx.pow(3).sum(), x)


def gradients_under_vmap(fn, x):
    x = x.requires_grad_()
    y = fn(x)
    vectors = torch.stack([y.sin(), y.cos()]).detach()
    return vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True))(vectors)


def hessian_products_under_vmap(fn, x):
    x = x.requires_grad_()
    (dx,) = torch.autograd.grad(fn(x).pow(3).sum(), x, create_graph=True)
    vectors = torch.stack([x.sin(), x.cos()]).detach()
    return vmap(lambda v: torch.autograd.grad(dx, x, v, retain_graph=True))(vectors)


def forward_mode(fn, x):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(fn(forward_ad.make_dual(x, x.cos()))))


def forward_over_reverse(fn, x):
    return jvp(grad(lambda x: fn(x).pow(3).sum()), (x,), (x.cos(),))


TRANSFORMS = {
    "is_grads_batched": gradients_in_a_batch,
    "is_grads_batched, create_graph": gradients_of_a_batch_of_gradients,
    "vmap of autograd.grad": gradients_under_vmap,
    "vmap of Hessian products": hessian_products_under_vmap,
    "func.grad": lambda fn, x: (grad(lambda x: fn(x).pow(3).sum())(x),),
    "func.grad of grad": lambda fn, x: (grad(lambda x: grad(lambda x: fn(x).pow(3).sum())(x).square().sum())(x),),
    "func.jvp": lambda fn, x: jvp(fn, (x,), (x.cos(),)),
    "func.jvp of grad": forward_over_reverse,
    "forward_ad": forward_mode,
    "vmap": lambda fn, x: (vmap(fn)(torch.stack([x, 2 * x.sin(), x - 3])),),
    "vmap of vmap": lambda fn, x: (vmap(vmap(fn))(torch.stack([x, 2 * x.sin()])[None]),),
    "vmap of grad": lambda fn, x: (vmap(grad(lambda x: fn(x).pow(3).sum()))(torch.stack([x, 2 * x.sin()])),),
    "vmap, another dimension": lambda fn, x: (vmap(fn, 3)(torch.stack([x, 2 * x.sin()], 3)),),
}


def plain_operators(layer, mask, residual):
    """The layer as a function of the whole batch, in operators that torch transforms itself."""
    weight, bias = layer.weight.detach(), layer.bias.detach()

    def fn(x):
        here = torch.ones_like(x[:, :1]) if mask is None else mask.view(-1, 1, 1).to(x.dtype).expand_as(x[:, :1])
        mean = (x * here).sum((0, 2), keepdim=True) / here.sum()
        var = ((x - mean).square() * here).sum((0, 2), keepdim=True) / here.sum()
        y = (x - mean) / (var + layer.eps).sqrt() * weight.view(-1, 1) + bias.view(-1, 1)
        return y if residual is None else (y + residual).relu()

    return fn


OPTIONS = {"plain": {}, "gather": {"reduction": "gather"}, "relu-residual": {"activation": "relu"}, "masked": {}}


def transformed(rank, name, layer, xs, masks, residuals):
    layer = copy.deepcopy(layer)
    mask, residual = masks[rank], residuals[rank]
    return TRANSFORMS[name](lambda x: layer(x, residual, mask), xs[rank].clone())


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("split", [[8], [5, 3], [8, 0]], ids=str)
def test_a_transform_of_the_ranks_is_that_of_the_whole_batch(split, name, option):
    x, _ = batch((3, 5), mean=1.0)
    layer = layer_of(3, track_running_stats=False, **OPTIONS[option])
    mask = torch.arange(8) % 3 != 1 if option == "masked" else None
    residual = x.cos() if option == "relu-residual" else None
    masks, residuals = ([None] * len(split) if t is None else t.split(split) for t in (mask, residual))
    arguments = name, layer, x.split(split), masks, residuals

    want = TRANSFORMS[name](plain_operators(layer, mask, residual), x.clone())
    got = [transformed(0, *arguments)] if len(split) == 1 else run_ranks(transformed, len(split), *arguments)

    # Third derivatives are sums of terms that cancel
    assert_close([torch.cat(parts, -3) for parts in zip(*got, strict=True)], list(want), rtol=1e-9, atol=1e-9)


def differentiated(rank, split, forward_ad, batched):
    layer = layer_of(2)
    x = batch((2, 2), n=sum(split), mean=1.0)[0].split(split)[rank].requires_grad_()
    mask = torch.ones(len(x), dtype=torch.bool)
    return torch.autograd.gradcheck(
        lambda x, w, b: functional_call(layer, {"weight": w, "bias": b}, (x, None, mask)),
        (x, layer.weight, layer.bias),
        check_forward_ad=forward_ad,
        check_batched_grad=batched,
        check_batched_forward_grad=forward_ad and batched,
    )


def test_gradcheck_with_all_that_it_can_check():
    assert differentiated(0, [4], True, True)


# The buffers


def moved(x, times=1):
    mean, var = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    for _ in range(times):
        mean, var = reference.running(x, mean, var)
    return {"running_mean": mean, "running_var": var, "num_batches_tracked": torch.tensor(times)}


def buffers_after(rank, name, xs):
    layer = SyncBatchNorm(3, dtype=torch.float64)
    TRANSFORMS[name](layer, xs[rank].clone())
    return dict(layer.named_buffers())


@pytest.mark.parametrize(
    "name", ["func.grad", "func.grad of grad", "func.jvp of grad", "forward_ad", "is_grads_batched"]
)
def test_the_running_buffers_move_once_a_call(name):
    x, _ = batch((3, 5))
    for buffers in run_ranks(buffers_after, 2, name, x.split([6, 2])):
        assert_close(buffers, moved(x), **EXACT)


def trained_ensemble(rank, xs, shared):
    """Two layers as one, by torch.func: their gradients and buffers; with inputs of their own, or one for both."""
    layers = [SyncBatchNorm(3, dtype=torch.float64) for _ in range(2)]
    nn.init.constant_(layers[1].weight, 2.0)
    parameters, buffers = stack_module_state(layers)
    x = xs[rank] if shared else torch.stack([xs[rank], xs[rank].sin()])

    def loss(parameters, buffers, x):
        return functional_call(layers[0], (parameters, buffers), x).pow(3).sum()

    return vmap(grad(loss), (0, 0, None if shared else 0))(parameters, buffers, x), buffers


@pytest.mark.parametrize("shared", [False, True])
def test_an_ensemble_moves_the_buffers_of_each(shared):
    x, _ = batch((3, 5))
    want = [moved(x), moved(x if shared else x.sin())]

    ranks = run_ranks(trained_ensemble, 2, x.split([6, 2]), shared)

    (alone, _), together = (
        trained_ensemble(0, [x], shared),
        {n: sum(g[n] for g, _ in ranks) for n in ("weight", "bias")},
    )
    assert_close(together, {n: t.detach() for n, t in alone.items()}, rtol=1e-9, atol=1e-9)
    for _, buffers in ranks:
        assert_close(buffers, {n: torch.stack([each[n] for each in want]) for n in want[0]}, **EXACT)


def mapped(rank, xs):
    try:
        vmap(SyncBatchNorm(3, dtype=torch.float64))(torch.stack([xs[rank]] * 2))
    except RuntimeError as error:
        return str(error)


def test_mapped_batches_that_would_move_the_same_buffers_are_refused():
    for error in run_ranks(mapped, 2, batch((3, 5))[0].split([6, 2])):
        assert "would move the same running buffers; map the buffers too" in error


# Messages


def messages(rank, name, xs):
    layer = SyncBatchNorm(3, track_running_stats=False, dtype=torch.float64)
    layer(xs[rank])  # the group is formed here
    with recorded() as sent:
        TRANSFORMS[name](layer, xs[rank].clone())
    return len(sent)


@pytest.mark.parametrize("name, count", [("vmap", 1), ("is_grads_batched", 3), ("func.grad", 2), ("func.jvp", 2)])
def test_a_batch_travels_as_one_message(name, count):
    """is_grads_batched composes the formula anew: a message each way more, however many gradients there are."""
    assert run_ranks(messages, 2, name, batch((3, 5))[0].split([6, 2])) == [count, count]


def summed_columns(rank):
    layer = SyncBatchNorm(3)
    layer(torch.randn(4, 3))
    group = layer._process_group(torch.randn(4, 3))
    message = torch.arange(6.0).view(2, 3) * (rank + 1)
    with recorded() as sent:
        return vmap(lambda m: collectives.summed(m, group), 1)(message), len(sent)


def test_a_message_may_be_mapped_along_any_dimension():
    for total, sent in run_ranks(summed_columns, 2):
        assert_close(total, 3 * torch.arange(6.0).view(2, 3).T)
        assert sent == 1


def refused(rank, kind):
    layer = SyncBatchNorm(3, track_running_stats=False)
    x = torch.randn(1, 3) if kind == "one value" and rank == 0 else torch.randn(0 if kind == "one value" else 4, 3)
    mask = torch.ones(len(x)) if kind == "mask" and rank == 1 else None
    try:
        vmap(lambda x: layer(x, mask=mask))(torch.stack([x, x]))
    except (TypeError, ValueError) as error:
        return str(error)


def test_what_one_rank_refuses_under_vmap_is_refused_on_all():
    peer, refuser = run_ranks(refused, 2, "mask")
    assert "mask has dtype torch.float32" in refuser
    assert "another rank of the group refused" in peer
    for error in run_ranks(refused, 2, "one value"):
        assert "the whole batch has one value per channel" in error


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=lambda t: t.__name__)
def test_whole_jacobians(transform):
    x, layer = batch((2, 2), n=3, mean=1.0)[0], layer_of(2, track_running_stats=False)
    want = transform(plain_operators(layer, None, None))(x)
    assert_close(transform(layer)(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorised_jacobians(strategy):
    x, layer = batch((2, 2), n=3, mean=1.0)[0], layer_of(2)
    want = torch.autograd.functional.jacobian(plain_operators(layer, None, None), x)
    got = torch.autograd.functional.jacobian(layer, x, vectorize=True, strategy=strategy)
    assert_close(got, want, rtol=1e-9, atol=1e-9)
