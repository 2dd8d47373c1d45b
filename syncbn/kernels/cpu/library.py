"""The C beside this file, through ctypes: each call takes one record of 8-byte fields, as cpu.h has them.

A record packed by `struct` costs the host 0.4 us, where 20 arguments of ctypes cost 1.7.
"""

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

from syncbn.kernels.cpu import build

PATH = Path(__file__).with_name("compiled.so")

_VECTOR = "2q"
_LAYOUT, _AFFINE, _RUNNING = "6q", f"{_VECTOR}{_VECTOR}qd", f"{_VECTOR}{_VECTOR}2qd"
_WIRE, _SEEN = "2q", "4q"

# What a call returns, as cpu.h has it
NO_MEMORY, UNFIT, UNFINISHED = 1, 2, 16


class Library:
    """The calls of a library: they return 0, UNFIT or UNFINISHED + an answer; without memory they raise MemoryError.

    Raises:
        OSError: there is no such library, or it was built from other sources than lie here.
    """

    def __init__(self, path: Path = PATH):
        library = ctypes.CDLL(str(path))
        library.syncbn_fingerprint.restype = ctypes.c_uint32
        if build.fingerprint() not in (0, library.syncbn_fingerprint()):
            raise OSError(f"{path} was built from other sources")
        library.syncbn_threads_of.argtypes = [ctypes.c_void_p]
        library.syncbn_threads_of(_gomp_parallel())
        self.moments = _call(library.syncbn_moments, f"{_LAYOUT}5q")
        self.normalize = _call(library.syncbn_normalize, f"{_LAYOUT}6q{_AFFINE}{_RUNNING}")
        self.forward = _call(library.syncbn_forward, f"{_LAYOUT}6q{_AFFINE}{_RUNNING}{_WIRE}{_SEEN}")
        self.grad_sums = _call(library.syncbn_grad_sums, f"{_LAYOUT}8q{_AFFINE}")
        self.grad_input = _call(library.syncbn_grad_input, f"{_LAYOUT}6q{_AFFINE}")
        self.backward = _call(library.syncbn_backward, f"{_LAYOUT}9q{_AFFINE}{_WIRE}")
        self.update_running = _call(library.syncbn_update_running, f"2q{_RUNNING}")


def _call(function, fields: str) -> Callable[..., int]:
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
    pack = struct.Struct(f"={fields}").pack

    def call(*values: float) -> int:
        answer = function(pack(*values))
        if answer == NO_MEMORY:
            raise MemoryError("no memory for the partial sums of batch norm")
        return answer

    return call


def _gomp_parallel() -> int | None:
    """Where the OpenMP that torch has loaded starts threads, or None: a second pool would be in their way."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


calls = Library()
