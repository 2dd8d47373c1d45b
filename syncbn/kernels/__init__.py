"""The work of one rank in three makes: contract.py says what it is, `choose` which of them does it."""

import warnings
from functools import cache

import torch
from torch import Tensor, nn

from syncbn.kernels import eager, native
from syncbn.kernels.contract import Affine, Form, Kernels, Local, Running, Sums, to_stats, unpacked

__all__ = ["Affine", "Form", "Kernels", "Local", "Running", "Sums", "choose", "to_stats", "unpacked"]


def choose(x: Tensor) -> Kernels:
    """The kernels for x's device: Triton's on CUDA; torch's operators elsewhere, and for torch.compile to fuse."""
    # Fake tensors, and others that stand for one, have no memory to launch a kernel on
    if not x.is_cuda or torch.compiler.is_compiling() or type(x) not in _PLAIN:
        return eager
    return _for_cuda()


_PLAIN = (Tensor, nn.Parameter)


@cache
def _for_cuda() -> Kernels:
    """Triton's, if every kernel compiles and runs: where one does not, this is where it shows, not in mid-training."""
    try:
        from syncbn.kernels import triton

        triton.probe(torch.device("cuda"))
        return triton
    except Exception as error:
        warnings.warn(f"Triton does not work here, so torch's own kernels are used: {error}", stacklevel=2)
        return native
