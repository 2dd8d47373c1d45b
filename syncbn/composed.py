"""Batch norm in torch's plain operators, for what differentiates or maps the call itself.

functional.py's node has a forward and a backward of its own, which torch cannot look into. Whoever differentiates that
backward (create_graph), hands it a batch of gradients (is_grads_batched), or is at work when the layer is called
(torch.func, vmap, forward-mode AD) gets the same numbers from here, at several times the cost.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from syncbn import checks, collectives
from syncbn.checks import Inputs
from syncbn.collectives import Exchange
from syncbn.kernels import Running
from syncbn.moments import Moments, merge, to_row, update_running


def transformed() -> bool:
    """Whether torch.func, vmap or forward-mode AD is at work. Always cheap."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def batched(dy: Tensor) -> bool:
    """Whether dy is a batch of gradients that torch hides from backward."""
    of_vmap: Any = torch._C
    return collectives.is_hidden_batch(dy) or of_vmap._functorch.is_functorch_wrapped_tensor(dy)


def batch_norm(
    inputs: Inputs, exchange: Exchange, eps: float, anchor: Tensor, running: Running | None = None
) -> tuple[Tensor, Moments, Tensor]:
    """y before residual and relu, the Moments of the whole batch, and invstd [C], all differentiable at will.

    anchor: [0], which the message depends on: where it requires a gradient, so does every collective within.
    """
    x, weight, bias, mask, _ = inputs
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
        rows = collectives.summed(place * row, exchange.group)
    rows = _Settled.apply(rows, x.shape, *(running or (None,) * 4))
    moments = merge(rows)
    invstd = (moments.var + eps).rsqrt()
    y = (values - _per_channel(moments.mean, x)) * _per_channel(invstd, x)
    y = y if weight is None else y * _per_channel(weight, x)
    y = y if bias is None else y + _per_channel(bias, x)
    return y.to(x.dtype), moments, invstd


def refuse(x: object, channels: int, exchange: Exchange) -> None:
    """collectives.refuse to peers that are in batch_norm here."""
    if exchange.group is not None:
        # Mapped as x is, and NaN
        nan = x.double().sum() * torch.nan if isinstance(x, Tensor) else torch.tensor(torch.nan).double()
        collectives.summed(nan.expand(exchange.group.size(), 2 * channels + 1), exchange.group)


class _Settled(torch.autograd.Function):
    """rows, once they are checked and the running buffers have moved: what needs the values themselves."""

    @staticmethod
    def forward(rows, shape, mean, var, batches, momentum) -> Tensor:
        checks.check_count(rows, shape)
        if mean is not None:
            update_running(mean, var, batches, merge(rows), momentum)
        return rows.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *(None,) * 5

    @staticmethod
    def jvp(ctx, tangent, *_):
        return tangent.clone()

    @staticmethod
    def vmap(info, in_dims, rows, shape, *running):
        where, _, *of_running = in_dims
        if where is not None and running[0] is not None and None in of_running[:3]:
            raise RuntimeError(
                "vmap over a SyncBatchNorm in training: every mapped batch would move the same running buffers; map "
                "the buffers too (torch.func.stack_module_state), or build the layer with track_running_stats=False"
            )
        return torch.stack(
            [
                _Settled.apply(_nth(rows, where, i), shape, *map(_nth, running, of_running, [i] * 4))
                for i in range(info.batch_size)
            ]
        ), 0


def _nth(value: Any, dim: int | None, i: int) -> Any:
    return value if dim is None else value.select(dim, i)


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))
