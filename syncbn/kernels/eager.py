"""The kernels in torch's own operators: any device, any dtype, no code to build.

On a CPU the parameter gradients of `native_batch_norm_backward` are the one vectorised pass that yields two sums per
channel; `var_mean`, and the statistics of `native_batch_norm` itself, go element by element in double.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from syncbn import moments as of_moments
from syncbn.kernels.contract import Affine, Form, Local, Running, Sums, mean_and_invstd, to_stats, unpacked
from syncbn.moments import Moments, to_message, to_row, unpack

__all__ = ["grad_input", "grad_sums", "moments", "normalize", "update_running"]

_native = torch.ops.aten.native_batch_norm
_native_backward = torch.ops.aten.native_batch_norm_backward

# Values that aten adds up in float32, beyond which rounding could show in the fifth digit: of rows one by one, of a
# plane in 16 lanes
_ROWS, _PLANE = 2**7, 2**11
# Values that lie in a core's cache twice over in float32
_BLOCK = 2**18


NEEDS_Y = True
WHOLE = None


def moments(x: Tensor, mask: Tensor | None, form: Form, per_image: bool = False) -> Local:
    local, work, between_images = _moments(x, mask, per_image)
    return Local(to_message(local) if form == "message" else to_row(local), work, between_images)


def normalize(
    x: Tensor,
    shared: Tensor,
    affine: Affine,
    residual: Tensor | None = None,
    running: Running | None = None,
    work: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    moments, invstd = statistics(shared, affine.eps, running)
    y = _normalized(x, moments.mean, invstd, affine, work)
    return finish(y, residual, affine.relu), to_stats(moments, invstd)


def statistics(shared: Tensor, eps: float, running: Running | None) -> tuple[Moments, Tensor]:
    """Moments of the whole batch, and invstd; the running buffers move."""
    moments = unpack(shared)
    if running is not None:
        of_moments.update_running(*running[:3], moments, running.momentum)
    return moments, (moments.var + eps).rsqrt()


def update_running(running: Running, stats: Tensor) -> None:
    of_moments.update_running(*running[:3], unpacked(stats)[0], running.momentum)


def grad_sums(dy: Tensor, x: Tensor, stats: Tensor, affine: Affine, y: Tensor | None) -> Sums:
    g = past_relu(dy, y, affine)
    if x.numel() == 0:
        return as_sums(stats.new_zeros(2 * x.size(1)), affine, g)
    mean, invstd = mean_and_invstd(stats)
    pivot = mean.to(_statistics_dtype(x))
    total, dot = _sums(g, x, pivot) if not _is_half(x) else _sums_of_half(g, x, pivot)
    return as_sums(torch.cat([total, torch.addcmul(dot, pivot - mean, total).mul_(invstd)]), affine, g)


def grad_input(g: Tensor, x: Tensor, stats: Tensor, affine: Affine, sums: Tensor, mask: Tensor | None) -> Tensor:
    # dx = (g - mean_g - xhat * mean_g_xhat) * scale, as an affine map of x plus one of g
    mean, invstd = mean_and_invstd(stats)
    mean_g, mean_g_xhat = (sums / stats[2 * x.size(1)].clamp(min=1)).chunk(2)
    scale = _scale(x, invstd, affine)
    slope = (invstd * mean_g_xhat).to(scale.dtype).mul_(scale).neg_()
    if _is_half(x):
        return _grad_input_of_half(g, x, mean, slope, mean_g, scale, mask)
    centred, pivot = _centred(x, mean)
    shift = ((pivot - mean) * slope).addcmul_(mean_g, scale, value=-1)
    through_moments = centred.mul_(_per_channel(slope, x)).add_(_per_channel(shift, x))
    if mask is not None:
        through_moments.masked_fill_(~mask, 0)
    return through_moments.addcmul_(g, _per_channel(scale, x))


def _grad_input_of_half(
    g: Tensor, x: Tensor, mean: Tensor, slope: Tensor, mean_g: Tensor, scale: Tensor, mask: Tensor | None
) -> Tensor:
    """In float32, and rounded once: what is added up may be larger than a half can be, and cancel."""
    if x.numel() == 0:
        return torch.empty_like(x)
    pivot = mean.float()
    vectors = (pivot, slope, (pivot - mean).float() * slope, mean_g, scale)
    pivot, slope, rest, mean_g, scale = (_per_channel(v, x) for v in vectors)
    pieces = []
    for (part, here), (past, _) in zip(_blocks(x, mask), _blocks(g, None), strict=True):
        through_var = part.float().sub_(pivot).mul_(slope).add_(rest)
        through_mean = mean_g
        if here is not None:
            through_var.masked_fill_(~here, 0)
            through_mean = mean_g.where(here, 0)
        pieces.append(through_var.addcmul_(past.float().sub_(through_mean), scale).to(x.dtype))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def finish(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """relu(y + residual), in y's place."""
    if torch.compiler.is_compiling():
        # torch 2.11 gives no gradient to what was made in place
        y = y if residual is None else y + residual
        return y.relu() if relu else y
    if residual is not None:
        y.add_(residual)
    return y.relu_() if relu else y


def past_relu(dy: Tensor, y: Tensor | None, affine: Affine) -> Tensor:
    """dy where relu let a value through."""
    return torch.ops.aten.threshold_backward(dy, y, 0) if affine.relu else dy


def as_sums(packed: Tensor, affine: Affine, g: Tensor) -> Sums:
    """packed, and the gradients of weight and bias out of it."""
    dbias, dweight = packed.clone().chunk(2)
    dweight = None if affine.weight is None else dweight.to(affine.weight.dtype)
    return Sums(packed, dweight, None if affine.bias is None else dbias.to(affine.bias.dtype), g)


def _moments(
    x: Tensor, mask: Tensor | None, per_image: bool
) -> tuple[Moments, tuple[Tensor, Tensor] | None, Tensor | None]:
    channels, size = x.size(1), x.numel() // x.size(1)
    if size == 0:
        local = Moments(*(x.new_zeros(shape, dtype=torch.float64) for shape in ((), channels, channels)))
        return local, None, x.new_zeros(channels + 1, dtype=torch.float64) if per_image else None
    count, pivot = _count(x, mask), _pivot(x, mask)
    if _is_half(x):
        work = None
        blocks = ((part.float().sub_(_per_channel(pivot, x)), m) for part, m in _blocks(x, mask))
        pieces = [_sums_of_block(_masked(part, m), per_image) for part, m in blocks]
        (total, squares), images = torch.stack([sums for sums, _ in pieces]).sum(0), torch.cat([t for _, t in pieces])
    else:
        centred = _masked(x - _per_channel(pivot, x), mask)
        # Compiled, nothing is gained by it
        work = (centred, pivot) if mask is None and not torch.compiler.is_compiling() else None
        (total, squares), images = _sums_of_block(centred, per_image)
    offset = total / count.clamp(min=1)
    moments = Moments(count, pivot + offset, torch.addcmul(squares, total, offset, value=-1).clamp_(min=0))
    return moments, work, _between_images(images, x, mask) if per_image else None


def _sums_of_block(x: Tensor, per_image: bool) -> tuple[Tensor, Tensor]:
    """[2, C] float64, sum x and sum x²; [N, C], sum x of each image, if asked for."""
    return _squares(x), _totals_of_images(x) if per_image else x.new_empty(0)


def _totals_of_images(x: Tensor) -> Tensor:
    dims = list(range(2, x.dim()))
    return x.sum(dims) if dims else x


def _between_images(totals: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Local.between_images, of the sums [N, C] over x less a pivot."""
    images, size = len(totals), x.numel() // totals.numel()
    totals = totals.double()
    if mask is None:
        return F.pad(totals.var(0, correction=0).mul_(images / size), (0, 1), value=images)
    counts = mask.expand_as(x[:, :1]).flatten(1).sum(1, dtype=torch.float64).unsqueeze(1)
    whole = totals.sum(0).square() / counts.sum().clamp(min=1)
    apart = (totals.square() / counts.clamp(min=1)).sum(0) - whole
    return torch.cat([apart.clamp_(min=0), (counts > 0).sum(0, dtype=torch.float64)])


def _normalized(x: Tensor, mean: Tensor, invstd: Tensor, affine: Affine, work: tuple[Tensor, Tensor] | None) -> Tensor:
    bias, scale = affine.bias, _scale(x, invstd, affine)
    if _is_half(x):
        return _scaled(x, mean, scale, bias)
    centred, pivot = _centred(x, mean) if work is None else work
    rest = (pivot - mean).to(x.dtype)
    shift = rest * scale if bias is None else torch.addcmul(bias, rest, scale)
    scale, shift = _per_channel(scale, x), _per_channel(shift, x)
    return torch.addcmul(shift, centred, scale) if work is None else centred.mul_(scale).add_(shift)


def _scale(x: Tensor, invstd: Tensor, affine: Affine) -> Tensor:
    """[C] what x - mean is multiplied by, in the dtype of statistics."""
    invstd = invstd.to(_statistics_dtype(x))
    return invstd if affine.weight is None else invstd * affine.weight


def _count(x: Tensor, mask: Tensor | None) -> Tensor:
    size = x.numel() // x.size(1)
    if mask is None:
        return torch.full((), size, dtype=torch.float64, device=x.device)
    return mask.sum(dtype=torch.float64) * (size // mask.numel())


def _pivot(x: Tensor, mask: Tensor | None) -> Tensor:
    """[C], a value near the mean of x: squares about it lose nothing."""
    dims, dtype = _all_but_channel(x), _statistics_dtype(x)
    if mask is not None:
        return (_masked(x, mask).sum(dims, dtype=dtype) / _count(x, mask).clamp(min=1)).to(dtype)
    if not torch.compiler.is_compiling():
        # The mean of a sixteenth of the values is within sqrt(15) standard deviations of that of all
        x = x[: (x.size(0) + 15) // 16]
    return x.mean(dims, dtype=dtype)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.where(mask, 0)


def _blocks(x: Tensor, mask: Tensor | None) -> Iterable[tuple[Tensor, Tensor | None]]:
    """x and mask, on a CPU in pieces that a core's cache holds in float32."""
    whole = x.device.type != "cpu" or torch.compiler.is_compiling()
    images = x.size(0) if whole else max(1, _BLOCK * x.size(0) // x.numel())
    parts = x.split(images)
    return zip(parts, [None] * len(parts) if mask is None else mask.split(images), strict=True)


def _centred(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """x less a pivot, and the pivot: mean, rounded to x's dtype."""
    pivot = mean.to(x.dtype)
    return x - _per_channel(pivot, x), pivot


def _scaled(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """(x - mean) * scale + shift in float32, typed as x."""
    if x.numel() == 0:
        return torch.empty_like(x)
    mean, scale = mean.float(), scale.float()
    shift = torch.zeros_like(scale) if shift is None else shift.float()
    return _native(x, scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]


def _squares(x: Tensor) -> Tensor:
    """[2, C] float64: sum x and sum x²."""
    return _sums(x, x, x.new_zeros(x.size(1)))


def _sums(dy: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """[2, C] float64: sum dy and sum dy * (x - mean)."""
    if torch.compiler.is_compiling():
        # inductor's float32 sums are exact enough; but of channels-last images on a CPU its float64 ones are faster
        wide = x.device.type == "cpu" and not x.is_contiguous()
        dims, dtype = _all_but_channel(x), torch.float64 if wide else mean.dtype
        dy, x = dy.to(mean.dtype), x - _per_channel(mean, x)
        return torch.stack([dy.sum(dims, dtype=dtype), (dy * x).sum(dims, dtype=dtype)]).double()
    if x.dim() > 2 and x.is_contiguous():
        return _sums_of_planes(dy.contiguous(), x, mean)
    # Of what has gaps, as the gradient of a sum has, aten adds up halves in half precision
    rows = x.movedim(1, -1).reshape(-1, x.size(1)).contiguous()
    return _sums_of_rows(dy.movedim(1, -1).reshape(rows.shape).contiguous(), rows, mean)


def _sums_of_half(dy: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """_sums of what is made float32 first: aten would add up all planes of halves in one float32."""
    pairs = zip(_blocks(dy, None), _blocks(x, None), strict=True)
    return torch.stack([_sums(part.float(), of_x.float(), mean) for (part, _), (of_x, _) in pairs]).sum(0)


def _sums_of_planes(dy: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """_sums where each channel lies in one piece, [N, C, *S]."""
    images, channels = x.shape[:2]
    size = x.numel() // (images * channels)
    fewest = -(-size // _PLANE)
    if fewest == 1:
        return _parameter_gradients(dy, x, mean)
    # Pieces of a plane as channels of their own; or, of a size that nothing divides, copies
    pieces = next((n for n in range(fewest, 4 * fewest) if size % n == 0), None)
    if pieces is None:
        parts = zip(*(t.reshape(images, channels, size).split(_PLANE, -1) for t in (dy, x)), strict=True)
        return torch.stack([_parameter_gradients(a.contiguous(), b.contiguous(), mean) for a, b in parts]).sum(0)
    dy, x = (t.view(images, channels * pieces, size // pieces) for t in (dy, x))
    return _parameter_gradients(dy, x, mean.repeat_interleave(pieces)).view(2, channels, pieces).sum(2)


def _sums_of_rows(dy: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """_sums where the channels of a position lie side by side, [R, C]."""
    rows, channels = x.shape
    if rows <= _ROWS:
        return _parameter_gradients(dy, x, mean)
    # Longer rows, of several positions, make shorter columns to add up
    fold = -(-rows // _ROWS)
    whole = rows - rows % fold
    dy_folded, x_folded = (t[:whole].reshape(-1, fold * channels) for t in (dy, x))
    sums = _parameter_gradients(dy_folded, x_folded, mean.repeat(fold)).view(2, fold, channels).sum(1)
    return sums if whole == rows else sums + _parameter_gradients(dy[whole:], x[whole:], mean)


def _parameter_gradients(dy: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    one = torch.ones_like(mean)
    # Saved statistics, behind the running ones, are not read without training; but on CUDA they must be there
    _, dot, total = _native_backward(dy, x, one, mean, one, mean, one, False, 0.0, [False, True, True])
    return torch.stack([total, dot]).double()


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_half(x: Tensor) -> bool:
    return x.dtype not in (torch.float32, torch.float64)


def _all_but_channel(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.to(_statistics_dtype(x)).view(1, -1, *[1] * (x.dim() - 2))
