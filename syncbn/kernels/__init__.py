"""The work of one rank in four makes: contract.py says what it is, `choose` which of them does it."""

import warnings
from functools import cache

import torch
from torch import Tensor, nn

from syncbn.kernels import eager, native
from syncbn.kernels.contract import Affine, Form, Kernels, Local, Running, Slot, Stopped, Sums, to_stats, unpacked

__all__ = [
    "Affine",
    "Form",
    "Kernels",
    "Local",
    "Running",
    "Slot",
    "Stopped",
    "Sums",
    "choose",
    "in_use",
    "to_stats",
    "unpacked",
]


def choose(x: Tensor) -> Kernels:
    """The kernels for x's device: Triton's on CUDA, those in C on CPUs; torch's operators elsewhere.

    Compiled, a graph takes those in C as operators of its own, and on CUDA torch's operators, for inductor to fuse.
    """
    if torch.compiler.is_compiling():
        return _to_compile(x)
    # Fake tensors, and others that stand for one, have no memory to launch a kernel on
    if type(x) not in _PLAIN:
        return eager
    if x.is_cuda:
        return _for_cuda()
    return _for_cpu() if x.is_cpu and x.dtype in _IN_C else eager


def in_use(device: torch.device | str = "cpu") -> str:
    """Which make a float32 tensor on such a device meets: "cpu" (in C), "triton", "native" or "eager"."""
    return choose(torch.empty(0, device=device)).__name__.rpartition(".")[2]


_PLAIN = (Tensor, nn.Parameter)
_IN_C = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _to_compile(x: Tensor) -> Kernels:
    if x.device.type != "cpu" or x.dtype not in _IN_C or not _loaded():
        return eager
    from syncbn.kernels.cpu import operators

    return operators


def _loaded() -> bool:
    """Whether CPUs have kernels in C."""
    return _for_cpu() is not eager


# What torch.compiler.assume_constant_result does, without its import of the whole compiler
_loaded._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@cache
def _for_cpu() -> Kernels:
    """Those in C, if they were built when syncbn was installed."""
    try:
        from syncbn.kernels import cpu

        return cpu
    except OSError as error:
        warnings.warn(
            f"batch norm on CPUs takes 2 to 5 times as long as it need: its kernels in C cannot be loaded ({error}). "
            "Install a C compiler, gcc or clang, and then syncbn again: pip install --editable .",
            stacklevel=2,
        )
        return eager


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
