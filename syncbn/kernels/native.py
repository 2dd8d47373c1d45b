"""torch's own kernels for SyncBatchNorm on CUDA devices, for where Triton is missing.

They read and write as little as Triton's, but take mean and invstd in float32, so y loses log10(|mean| / sqrt(var)) of
its 7 digits. What they cannot do, masks and what differs between images, is eager's.
"""

import torch
from torch import Tensor

from syncbn.kernels import eager
from syncbn.kernels.contract import Affine, Form, Local, Running, Sums, mean_and_invstd, to_stats
from syncbn.kernels.eager import update_running
from syncbn.moments import Moments, to_message, to_row

__all__ = ["grad_input", "grad_sums", "moments", "normalize", "update_running"]

NEEDS_Y = True
WHOLE = None


def moments(x: Tensor, mask: Tensor | None, form: Form, per_image: bool = False) -> Local:
    if mask is not None or per_image or x.numel() == 0:
        return eager.moments(x, mask, form, per_image)._replace(work=None)
    # Without an eps, the invstd of a constant is 0
    mean, invstd = torch.batch_norm_stats(x, 0.0)
    count = torch.full((), x.numel() // x.size(1), dtype=torch.float64, device=x.device)
    m2 = torch.where(invstd > 0, count / invstd.double().square(), 0.0)
    local = Moments(count, mean.double(), m2)
    return Local(to_message(local) if form == "message" else to_row(local))


def normalize(
    x: Tensor,
    shared: Tensor,
    affine: Affine,
    residual: Tensor | None = None,
    running: Running | None = None,
    work: None = None,
) -> tuple[Tensor, Tensor]:
    stats = to_stats(*eager.statistics(shared, affine.eps, running))
    if x.numel() == 0:
        return torch.empty_like(x), stats
    y = torch.batch_norm_elemt(x, affine.weight, affine.bias, *_mean_and_invstd(x, stats), 0.0)
    return eager.finish(y, residual, affine.relu), stats


def grad_sums(dy: Tensor, x: Tensor, stats: Tensor, affine: Affine, y: Tensor | None) -> Sums:
    if x.numel() == 0:
        return eager.grad_sums(dy, x, stats, affine, y)
    g = eager.past_relu(dy, y, affine)
    mean, invstd = _mean_and_invstd(x, stats)
    total, dot, *_ = torch.batch_norm_backward_reduce(g, x, mean, invstd, affine.weight, True, False, False)
    return eager.as_sums(torch.cat([total, dot * invstd]).double(), affine, g)


def grad_input(g: Tensor, x: Tensor, stats: Tensor, affine: Affine, sums: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None or x.numel() == 0:
        return eager.grad_input(g, x, stats, affine, sums, mask)
    _, exact_invstd = mean_and_invstd(stats)
    mean, invstd = _mean_and_invstd(x, stats)
    total, dot_xhat = sums.chunk(2)
    dot, counts = (dot_xhat / exact_invstd).to(mean.dtype), stats[2 * x.size(1)].to(torch.int32).view(1)
    return torch.batch_norm_backward_elemt(g, x, mean, invstd, affine.weight, total.to(mean.dtype), dot, counts)


def _mean_and_invstd(x: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """[C] each, in the dtype that torch's kernels accumulate x in."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, invstd = mean_and_invstd(stats)
    return mean.to(dtype), invstd.to(dtype)
