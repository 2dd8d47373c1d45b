"""The kernels in torch's own operators: any device, any dtype, no code to build.

On a CPU `native_batch_norm` (eval mode) and the parameter gradients of `native_batch_norm_backward` are vectorised
passes over x, which `var_mean` is not.
"""

import torch
from torch import Tensor

from syncbn.moments import Moments

_native = torch.ops.aten.native_batch_norm
_native_backward = torch.ops.aten.native_batch_norm_backward


def moments(x: Tensor) -> Moments:
    channels, dtype = x.size(1), _statistics_dtype(x)
    size = x.numel() // channels
    count = torch.full((), size, dtype=torch.float64, device=x.device)
    if size == 0:
        return Moments(count, *torch.zeros(2, channels, dtype=torch.float64, device=x.device))
    zero, one = torch.zeros(channels, dtype=dtype, device=x.device), torch.ones(channels, dtype=dtype, device=x.device)
    pivot = zero
    if x.dtype == dtype:
        # Squares about a value near the mean: nothing cancels. In half precision x itself is coarser than what cancels.
        pivot = x.sum(_all_but_channel(x)) / size
        x = x - _per_channel(pivot, x)
    total, squares = _sums(x, x, zero, one).double().chunk(2)
    offset = total / size
    return Moments(count, pivot + offset, torch.addcmul(squares, total, offset, value=-1))


def normalize(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return _affine(x, mean, invstd if weight is None else invstd * weight, bias)


def grad_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    if x.numel() == 0:
        return torch.zeros(2 * x.size(1), dtype=torch.float64, device=x.device)
    dtype = _statistics_dtype(x)
    return _sums(dy, x, mean.to(dtype), invstd.to(dtype)).double()


def grad_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
) -> Tensor:
    # dx = (dy - mean_dy - xhat * mean_dy_xhat) * scale, as an affine map of x plus one of dy
    scale = invstd if weight is None else invstd * weight
    from_x = _affine(x, mean, -scale * invstd * mean_dy_xhat, -scale * mean_dy)
    return from_x.add_(_affine(dy, torch.zeros_like(mean), scale, None))


def _affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """(x - mean) * scale + shift, typed as x."""
    if x.numel() == 0:
        return torch.empty_like(x)
    mean, scale = mean.to(_statistics_dtype(x)), scale.to(_statistics_dtype(x))
    shift = torch.zeros_like(scale) if shift is None else shift.to(scale.dtype)
    return _native(x, scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]


def _sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """[2C] = [sum dy | sum dy * (x - mean) * invstd], typed as mean."""
    one = torch.ones_like(mean)
    wanted = [False, True, True]
    _, dot, total = _native_backward(dy, x, one, mean, one, None, None, False, 0.0, wanted)
    return torch.cat([total, dot * invstd])


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _all_but_channel(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))
