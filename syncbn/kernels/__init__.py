"""The work of one rank in three makes: contract.py says what it is, `choose` which of them does it."""

import warnings
from functools import cache

import torch
from torch import Tensor, nn

from syncbn.kernels import eager
from syncbn.kernels.contract import Affine, Form, Kernels, Local, Sums

__all__ = ["Affine", "Form", "Kernels", "Local", "Sums", "choose"]


def choose(x: Tensor) -> Kernels:
    """The kernels for x's device: Triton's on CUDA; torch's operators elsewhere, and for torch.compile to fuse."""
    # Fake tensors, and others that stand for one, have no memory to launch a kernel on
    if x.device.type != "cuda" or torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return eager
    return _for_cuda()


@cache
def _for_cuda() -> Kernels:
    try:
        from syncbn.kernels import triton

        # Where there is no C compiler, or the GPU is too old, this is where it shows
        triton.statistics(torch.zeros(1, 3, dtype=torch.float64, device="cuda"), 1.0)
        return triton
    except Exception as error:
        from syncbn.kernels import native

        warnings.warn(f"Triton does not work here, so torch's own kernels are used: {error}", stacklevel=2)
        return native
