"""Synchronised batch norm as one function: the kernels of this rank, one message to the others, each way."""

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from syncbn import collectives, kernels
from syncbn.collectives import Exchange, Group, Reduction
from syncbn.kernels import Affine, Form, Local, Running, unpacked
from syncbn.moments import Moments, merge, to_row

Activation = Literal["relu"] | None


class Observer(Protocol):
    """Somebody who looks at what a layer's batch was, on this rank and in its group.

    per_image: whether to measure what differs between images.
    observe: is given kernels.Local's packed and between_images, and the Moments of the whole batch. It may be compiled,
        and must not wait for the device.
    """

    per_image: bool

    def observe(self, packed: Tensor, form: Form, between_images: Tensor | None, moments: Moments) -> None: ...


# An input that needs a gradient whatever the others do, so that backward, and its collective, runs on every rank
_ANCHOR = torch.zeros(0, device="cpu", requires_grad=True)


def sync_batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group: Group = "world",
    reduction: Reduction = "all_reduce",
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = None,
) -> tuple[Tensor, Moments]:
    """Normalise x with the mean and variance of every rank's batch taken together.

    Per channel, y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), where mean and the biased var
    are over all N and *S of all ranks. Ranks may differ in N and *S, and may be empty. Differentiable any number of
    times: where backward itself is to be differentiated (create_graph=True), it composes the formula from plain
    operators.

    Args:
        x: [N, C, *S], any floating dtype; passes over x compute in float32, or float64 if x is.
        weight: [C], or None for 1.
        bias: [C], or None for 0.
        eps: added to the variance.
        group: the ranks that form the batch: see `syncbn.Group`.
        reduction: "all_reduce", "gather" or "one_shot": see `syncbn.Reduction`.
        mask: [N] or [N, 1, *S] bool, the elements that count in mean and var, or None for all. The others are
            normalised by them all the same, so they must be finite.
        residual: [N, C, *S], added to what is normalised, or None; a rank may have one where another has none.
        activation: "relu", or None. On a GPU, both are a part of the pass that normalises, and of those of backward.

    Returns:
        y, shaped and typed as x (memory format too), and the Moments of the whole batch, the same bits on every rank.
        Gradients of weight and bias are this rank's share: their sum over ranks is that of the whole batch.

    Raises:
        TypeError: x is not of a floating dtype, or mask not of bool.
        ValueError: eps is below 0; C differs from the length of weight or bias; mask or residual does not fit x; no
            such group, reduction or activation; the whole batch has one value per channel. On a CPU, also if a peer
            refused its input to this call.

    Collective: one message of 2C + 1 float64 forward, one of 2C backward; every rank of the group must call it, and
    its backward, in the same order, whether or not its own tensors need a gradient. The first call with a group also
    forms it, with every rank of the world; not so a ProcessGroup or DeviceMesh.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1. Derivation: docs/math.md.
    """
    samples = x.size(0) if isinstance(group, Mapping) and x.dim() else 0
    exchange = Exchange(collectives.resolve_once(group, samples), collectives.checked(reduction))
    channels = x.size(1) if x.dim() > 1 else 0
    y, stats = batch_norm(x, weight, bias, mask, residual, channels, Call(exchange, eps, checked(activation) == "relu"))
    return y, unpacked(stats)[0]


def checked(activation: Activation) -> Activation:
    """activation, or ValueError."""
    if activation not in (None, "relu"):
        raise ValueError(f"activation is {activation!r}: it must be 'relu' or None")
    return activation


class Call(NamedTuple):
    """What a call of batch norm is given besides its tensors.

    running: the buffers to be moved.
    known: kernels' stats of the whole batch, of a forward that runs again; then nothing is measured and sent.
    """

    exchange: Exchange
    eps: float = 1e-5
    relu: bool = False
    running: Running | None = None
    observer: Observer | None = None
    known: Tensor | None = None


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    channels: int,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """sync_batch_norm for a layer of `channels`: y, and kernels' stats [3C + 1] of the whole batch."""
    exchange = call.exchange
    try:
        mask = _checked(x, weight, bias, mask, residual, channels, call.eps)
    except (TypeError, ValueError):
        collectives.refuse(channels, exchange, x.device)
        raise
    if residual is not None and residual.dtype != x.dtype:
        residual = residual.to(x.dtype)
    anchor = None if exchange.group is None or x.requires_grad else _ANCHOR
    running = call.running
    if running is None or not (call.observer is not None or torch.compiler.is_compiling()):
        return _BatchNorm.apply(x, weight, bias, residual, anchor, mask, call)
    # An observer compares the batch with the buffers as they were; compiled, a Function may not change its inputs
    y, stats = _BatchNorm.apply(x, weight, bias, residual, anchor, mask, call._replace(running=None))
    kernels.choose(x).update_running(running, stats)
    return y, stats


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, anchor, mask, call):
        exchange, eps, relu, running, observer, known = call
        kernel, form = kernels.choose(x), collectives.form(exchange)
        if known is not None:
            # Their first part is a row, see moments.to_row
            local, shared = Local(known), known[: 2 * x.size(1) + 1].unsqueeze(0)
        else:
            local = kernel.moments(x, mask, form, observer is not None and observer.per_image)
            shared = collectives.share_moments(local.packed if observer is None else local.packed.clone(), exchange)
            _check_count(shared, x, mask, exchange)
        affine = Affine(weight, bias, relu, eps)
        y, stats = kernel.normalize(x, shared, affine, residual, running, local.work)
        if observer is not None:
            observer.observe(local.packed, form, local.between_images, unpacked(stats)[0])
        ctx.needs_y = relu and (kernel.NEEDS_Y or residual is not None)
        ctx.save_for_backward(x, stats, weight, bias, mask, y if ctx.needs_y else None)
        ctx.call, ctx.added = call, residual is not None
        ctx.mark_non_differentiable(stats)
        # Or backward would begin by filling a gradient of stats with zeros
        ctx.set_materialize_grads(False)
        return y, stats

    @staticmethod
    def backward(ctx, dy, _):
        x, stats, weight, bias, mask, y = ctx.saved_tensors
        exchange, eps, relu, *_ = ctx.call
        # What follows may have no gradient to give; the peers wait all the same
        dy = torch.zeros_like(x) if dy is None else dy
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_backward_to_differentiate(ctx, dy, x, weight, bias, mask, y), None, None, None
        kernel, affine = kernels.choose(x), Affine(weight, bias, relu, eps)
        packed, dweight, dbias, g = kernel.grad_sums(dy, x, stats, affine, y)
        # Whatever this rank needs of it, its peers need its part
        sums = collectives.share_sums(packed, exchange)
        dx = None
        if ctx.needs_input_grad[0]:
            past_relu = affine if y is None else affine._replace(relu=False)
            dx = kernel.grad_input(g, x, stats, past_relu, sums, mask)
        return dx, dweight, dbias, g if ctx.added else None, None, None, None


def _backward_to_differentiate(ctx, dy, x, weight, bias, mask, y):
    """dx, dweight, dbias and dresidual, with their own graph: backward through the formula in plain operators."""
    anchor = torch.zeros(0, requires_grad=True)
    composed = _composed(x, weight, bias, anchor, mask, ctx.call.eps, ctx.call.exchange)
    g = dy * ((composed if y is None else y) > 0) if ctx.call.relu else dy
    inputs = [t if t is not None and t.requires_grad else None for t in (x, weight, bias)]
    wanted = [anchor, *(t for t in inputs if t is not None)]
    # The anchor takes part so that the collectives within run on every rank
    _, *gradients = torch.autograd.grad(composed, wanted, g, create_graph=True, allow_unused=True)
    return *[None if t is None else gradients.pop(0) for t in inputs], g if ctx.added else None


def _composed(x, weight, bias, anchor, mask, eps, exchange: Exchange) -> Tensor:
    """y before residual and relu, in operators that are differentiable any number of times."""
    values = x.double()
    dims = [d for d in range(x.dim()) if d != 1]
    here = torch.ones_like(values[:, :1]) if mask is None else mask.double().expand_as(values[:, :1])
    count = here.sum()
    # Selected, not multiplied: what is masked may be anything
    mean = values.where(here > 0, 0).sum(dims) / count.clamp(min=1)
    m2 = (values - _per_channel(mean, x)).where(here > 0, 0).square().sum(dims)
    row = to_row(Moments(count, mean, m2)) + anchor.double().sum().to(x.device)
    rows = row.unsqueeze(0)
    if exchange.group is not None:
        # Each rank's row among zeros: summed, they are gathered
        place = torch.zeros(exchange.group.size(), 1, dtype=row.dtype, device=x.device)
        place[exchange.group.rank()] = 1
        rows = collectives.Summed.apply(place * row, exchange.group)
    moments = merge(rows)
    y = (values - _per_channel(moments.mean, x)) * _per_channel((moments.var + eps).rsqrt(), x)
    y = y if weight is None else y * _per_channel(weight, x)
    y = y if bias is None else y + _per_channel(bias, x)
    return y.to(x.dtype)


def _checked(x, weight, bias, mask, residual, channels: int, eps: float) -> Tensor | None:
    """mask, as [N, 1, *S] or [N, 1, 1, ...]; TypeError or ValueError for what does not fit together."""
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}: batch norm takes a floating dtype, say x.float()")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}: it must not be below 0, or a root of a negative number is taken")
    if x.dim() < 2 or x.size(1) != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}: it must be [N, {channels or 'C'}, *S]")
    if x.size(0) > 0 and x.numel() == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: a spatial size of 0 holds no values; a rank without data has N = 0"
        )
    for name, parameter in ("weight", weight), ("bias", bias):
        if parameter is not None and parameter.numel() != channels:
            raise ValueError(f"x has {channels} channels but {name} has {parameter.numel()}: they must match")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} but residual {tuple(residual.shape)}: they must be the same")
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}: it must be bool, True where an element counts")
    if mask.shape == x.shape[:1]:
        return mask.view(-1, *[1] * (x.dim() - 1))
    if mask.shape != (x.size(0), 1, *x.shape[2:]):
        raise ValueError(f"x has shape {tuple(x.shape)} but mask {tuple(mask.shape)}: mask must be [N] or [N, 1, *S]")
    return mask


def _check_count(shared: Tensor, x: Tensor, mask: Tensor | None, exchange: Exchange) -> None:
    """Refuse, on every rank, a whole batch that has no variance, or part of which was refused."""
    one_value = "the whole batch has one value per channel: a variance needs more"
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        if mask is not None or x.numel() <= x.size(1):
            torch._assert_async(shared[..., -1].sum() != 1, one_value)  # pyright: ignore[reportPrivateImportUsage]
        return
    if exchange.group is None and mask is None:
        # Known without a look at shared, which costs as much as a pass over a small x
        size = x.numel() // x.size(1)
    else:
        size = shared[..., -1].sum().item() if shared.dim() > 1 and len(shared) > 1 else shared.view(-1)[-1].item()
    if size == 1:
        raise ValueError(f"{one_value}; x has shape {tuple(x.shape)} on this rank")
    if size != size:
        raise ValueError("another rank of the group refused its input to this layer: its own error says why")


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))
