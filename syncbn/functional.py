"""Synchronised batch norm as one function: the kernels of this rank, one message to the others, each way."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from syncbn import checks, collectives, composed, kernels
from syncbn.checks import Activation, Inputs
from syncbn.collectives import Exchange, Group, Reduction
from syncbn.kernels import Affine, Form, Kernels, Running, Slot, Stopped, to_stats, unpacked
from syncbn.moments import Moments


class Observer(Protocol):
    """Somebody who looks at what a layer's batch was, on this rank and in its group.

    per_image: whether to measure what differs between images.
    observe: is given kernels.Local's packed and between_images, and the stats of the whole batch, before the running
        buffers move. It may be compiled, and must not wait for the device.
    slot: where C may leave the same itself, after which it is `filled`; None if it is to be observed.
    """

    per_image: bool
    filled: int

    def observe(self, packed: Tensor, form: Form, between_images: Tensor | None, stats: Tensor) -> None: ...
    def slot(self, form: Form) -> Slot | None: ...


# An input that needs a gradient whatever the others do, so that backward, and its collective, runs on every rank
_ANCHOR = torch.zeros(0, device="cpu", requires_grad=True)


def sync_batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group: Group = "world",
    reduction: Reduction = "auto",
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
        reduction: "auto", "all_reduce", "gather" or "one_shot": see `syncbn.Reduction`.
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
    exchange = Exchange(collectives.resolve_once(group, samples), collectives.check_reduction(reduction))
    channels = x.size(1) if x.dim() > 1 else 0
    y, stats = batch_norm(Inputs(x, weight, bias, mask, residual), Call(exchange, channels, eps, activation))
    return y, unpacked(stats)[0]


class Call(NamedTuple):
    """What a call of batch norm is given besides its tensors.

    channels: of the layer, which x must have.
    running: the buffers to be moved.
    stats: kernels' stats of the whole batch, of a forward that runs again; then nothing is measured and sent.
    """

    exchange: Exchange
    channels: int
    eps: float = 1e-5
    activation: Activation = None
    running: Running | None = None
    observer: Observer | None = None
    stats: Tensor | None = None


def batch_norm(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """sync_batch_norm for a layer: y, and kernels' stats [3C + 1] of the whole batch."""
    x, weight, bias, _, residual = inputs
    exchange = call.exchange
    transformed = not torch.compiler.is_compiling() and composed.transformed()
    try:
        mask = checks.check_inputs(inputs, call.channels, call.eps, call.activation)
    except (TypeError, ValueError) as error:
        if torch.compiler.is_compiling():
            return _refused_as_it_runs(inputs, call, str(error))
        if transformed:
            composed.refuse(x, call.channels, exchange)
        else:
            collectives.refuse(call.channels, exchange, _device(inputs))
        raise
    if residual is not None and residual.dtype != x.dtype:
        residual = residual.to(x.dtype)
    if transformed:
        return _batch_norm_to_transform(Inputs(x, weight, bias, mask, residual), call)
    anchor = None if exchange.group is None or x.requires_grad else _ANCHOR
    running = call.running
    if running is None or not torch.compiler.is_compiling():
        return _BatchNorm.apply(x, weight, bias, residual, anchor, mask, call)
    # Compiled, a Function may not change its inputs
    y, stats = _BatchNorm.apply(x, weight, bias, residual, anchor, mask, call._replace(running=None))
    kernels.choose(x).update_running(running, stats)
    return y, stats


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, anchor, mask, call):
        relu = call.activation == "relu"
        kernel, affine = kernels.choose(x), Affine(weight, bias, relu, call.eps)
        if call.stats is not None:
            # Their first part is a row, see moments.to_row
            shared = call.stats[: 2 * x.size(1) + 1].unsqueeze(0)
            y, stats = kernel.normalize(x, shared, affine, residual, call.running)
        else:
            y, stats = _forward(kernel, x, mask, affine, residual, call)
        needs_y = relu and (kernel.NEEDS_Y or residual is not None)
        ctx.save_for_backward(x, stats, weight, bias, mask, y if needs_y else None)
        ctx.call, ctx.added = call, residual is not None
        ctx.mark_non_differentiable(stats)
        # Or backward would begin by filling a gradient of stats with zeros
        ctx.set_materialize_grads(False)
        return y, stats

    @staticmethod
    def backward(ctx, dy, _):
        x, stats, weight, bias, mask, y = ctx.saved_tensors
        exchange, _, eps, activation, *_ = ctx.call
        # What follows may have no gradient to give; the peers wait all the same
        dy = torch.zeros_like(x) if dy is None else dy
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or composed.batched(dy)):
            return *_backward_to_differentiate(ctx, dy, Inputs(x, weight, bias, mask), y), None, None, None
        affine = Affine(weight, bias, activation == "relu", eps)
        dx, dweight, dbias, g = _backward(dy, x, stats, affine, y, mask, exchange, ctx.needs_input_grad[0])
        return dx, dweight, dbias, g if ctx.added else None, None, None, None


def _forward(
    kernel: Kernels, x: Tensor, mask: Tensor | None, affine: Affine, residual: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    """y and stats of a batch that all ranks tell each other of; the observer is told, and the running buffers move."""
    exchange, running, observer, form = call.exchange, call.running, call.observer, collectives.form(call.exchange)
    line = slot = None
    if (whole := kernel.WHOLE) is not None:
        slot = None if observer is None or running is None else observer.slot(form)
        if observer is None or slot is not None:
            line = collectives.line(exchange, 2 * x.size(1) + 1, x.device, "forward")
    if whole is None or line is None:
        local = kernel.moments(x, mask, form, observer is not None and observer.per_image)
        shared = collectives.share_moments(local.packed if observer is None else local.packed.clone(), exchange)
    else:
        done = whole.forward(x, mask, form, affine, residual, running, line.addresses, slot)
        if not isinstance(done, Stopped):
            line.ended()
            if observer is not None:
                observer.filled += 1
            return done
        local, shared, answer = done
        line.ended(answer, shared)
    enough = mask is None and x.numel() > x.size(1)
    if exchange.group is not None or not enough:
        checks.check_count(shared, x.shape, enough)
    y, stats = kernel.normalize(x, shared, affine, residual, None if observer else running, local.work)
    if observer is not None:
        # It compares the batch with the buffers as they were
        observer.observe(local.packed, form, local.between_images, stats)
        if running is not None:
            kernel.update_running(running, stats)
    return y, stats


def _backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    affine: Affine,
    y: Tensor | None,
    mask: Tensor | None,
    exchange: Exchange,
    wants_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """dx, if it is wanted, dweight, dbias and g. Whatever this rank needs of the sums, its peers need its part."""
    kernel = kernels.choose(x)
    whole = kernel.WHOLE
    line = None if whole is None else collectives.line(exchange, 2 * x.size(1), x.device, "backward")
    if whole is None or line is None:
        packed, dweight, dbias, g = kernel.grad_sums(dy, x, stats, affine, y)
        sums = collectives.share_sums(packed, exchange)
    else:
        dx, dweight, dbias, g, answer = whole.backward(dy, x, stats, affine, y, mask, line.addresses, wants_dx)
        sums = torch.empty(2 * x.size(1), dtype=torch.float64) if answer else None
        line.ended(answer, sums)
        if sums is None:
            return dx, dweight, dbias, g
    if not wants_dx:
        return None, dweight, dbias, g
    past_relu = affine if y is None else affine._replace(relu=False)
    return kernel.grad_input(g, x, stats, past_relu, sums, mask), dweight, dbias, g


def _backward_to_differentiate(ctx, dy: Tensor, inputs: Inputs, y: Tensor | None):
    """dx, dweight, dbias and dresidual through plain operators: to be differentiated, or for a batch of dy."""
    exchange, _, eps, activation, *_ = ctx.call
    graph, anchor = torch.is_grad_enabled(), torch.zeros(0, requires_grad=True)
    with torch.enable_grad():
        normalized, *_ = composed.batch_norm(inputs, exchange, eps, anchor)
    g = dy if activation is None else dy.masked_fill((normalized if y is None else y) <= 0, 0)
    leaves = [t if t is not None and t.requires_grad else None for t in (inputs.x, inputs.weight, inputs.bias)]
    wanted = [anchor, *(t for t in leaves if t is not None)]
    # The anchor takes part so that the collectives within run on every rank
    _, *gradients = torch.autograd.grad(normalized, wanted, g, create_graph=graph, allow_unused=True)
    return *[None if t is None else gradients.pop(0) for t in leaves], g if ctx.added else None


def _batch_norm_to_transform(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """batch_norm where torch.func, vmap or forward-mode AD is at work. No observer sees it."""
    y, moments, invstd = composed.batch_norm(inputs, call.exchange, call.eps, _ANCHOR, call.running)
    y = y if inputs.residual is None else y + inputs.residual
    return y if call.activation is None else y.relu(), to_stats(moments, invstd).detach()


def _refused_as_it_runs(inputs: Inputs, call: Call, why: str) -> tuple[Tensor, Tensor]:
    """A graph that refuses its input when it runs: an error in its making would leave the peers waiting."""
    x, device = inputs.x, _device(inputs)
    collectives.refuse(call.channels, call.exchange, device)
    torch._assert_async(torch.zeros((), device=device), why)  # pyright: ignore[reportPrivateImportUsage]
    stats = torch.full((3 * call.channels + 1,), torch.nan, dtype=torch.float64, device=device)
    return x * torch.nan if isinstance(x, Tensor) else stats, stats


def _device(inputs: Inputs) -> torch.device:
    """Where this rank's messages lie, whatever it was given."""
    return next((t.device for t in (inputs.x, inputs.weight) if isinstance(t, Tensor)), torch.device("cpu"))
