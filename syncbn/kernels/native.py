"""torch's own kernels for SyncBatchNorm on CUDA devices, for where Triton is missing.

They read and write as little as Triton's, but take mean and invstd in float32, so y loses log10(|mean| / sqrt(var)) of
its 7 digits. What they cannot do, masks and what differs between images, is eager's.
"""

import torch
from torch import Tensor

from syncbn.kernels import eager
from syncbn.kernels.contract import Affine, Form, Local, Sums
from syncbn.kernels.eager import statistics, update_running
from syncbn.moments import Moments, to_message, to_row

__all__ = ["grad_input", "grad_sums", "moments", "normalize", "statistics", "update_running"]

NEEDS_Y = True


def moments(x: Tensor, mask: Tensor | None, form: Form, per_image: bool = False) -> Local:
    if mask is not None or per_image or x.numel() == 0:
        return eager.moments(x, mask, form, per_image)._replace(work=None)
    # Without an eps, the invstd of a constant is 0
    mean, invstd = torch.batch_norm_stats(x, 0.0)
    count = torch.full((), x.numel() // x.size(1), dtype=torch.float64, device=x.device)
    m2 = torch.where(invstd > 0, count / invstd.double().square(), 0.0)
    local = Moments(count, mean.double(), m2)
    return Local(to_message(local) if form == "message" else to_row(local))


def normalize(x: Tensor, affine: Affine, residual: Tensor | None, work: None) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    mean, invstd = _in_float(affine)
    return eager.finish(torch.batch_norm_elemt(x, affine.weight, affine.bias, mean, invstd, 0.0), residual, affine.relu)


def grad_sums(dy: Tensor, x: Tensor, affine: Affine, y: Tensor | None) -> Sums:
    if x.numel() == 0:
        return eager.grad_sums(dy, x, affine, y)
    g = eager.past_relu(dy, y, affine)
    mean, invstd = _in_float(affine)
    total, dot, *_ = torch.batch_norm_backward_reduce(g, x, mean, invstd, affine.weight, True, False, False)
    return eager.as_sums(torch.cat([total, dot * invstd]).double(), affine, g)


def grad_input(g: Tensor, x: Tensor, affine: Affine, sums: Tensor, count: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None or x.numel() == 0:
        return eager.grad_input(g, x, affine, sums, count, mask)
    mean, invstd = _in_float(affine)
    total, dot_xhat = sums.chunk(2)
    dot, counts = (dot_xhat / affine.invstd).to(mean.dtype), count.to(torch.int32).view(1)
    total = total.to(mean.dtype)
    return torch.batch_norm_backward_elemt(g, x, mean, invstd, affine.weight, total, dot, counts)


def _in_float(affine: Affine) -> tuple[Tensor, Tensor]:
    return affine.mean.float(), affine.invstd.float()
