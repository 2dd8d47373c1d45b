"""mailbox.c for Python: rows that the ranks of one host leave for each other, and whom a rank need not wait for."""

import ctypes
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DistBackendError  # noqa: TID251 (an error's name, which says nothing)

NONCE_BYTES = 16
# As in mailbox.c
_SUM, _ROWS, _FIRST = range(3)
_COMPLETE, _WAITING, _LENGTHS_DIFFER, _CLOSED = range(4)
_COMING, _ARRIVED, _GONE = range(3)


def _load() -> Any:
    """The library that setup.py makes of mailbox.c; None where it could not."""
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name("compiled.so")), use_errno=True)
    except OSError:
        return None
    size, address, place = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint32
    signatures = {
        "size": ([place], size),
        "open": ([ctypes.c_int, ctypes.c_char_p, place, place, ctypes.c_long], address),
        "close": ([address], None),
        "share": ([address, address, size, address, ctypes.c_int], ctypes.c_int),
        "finish": ([address, size, address, ctypes.c_int], ctypes.c_int),
        "peer": ([address, place], ctypes.c_int),
        "length": ([address, place], size),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, f"mailbox_{name}")
        function.argtypes, function.restype = arguments, result
    return library


_library = _load()
CAPACITY = ctypes.c_size_t.in_dll(_library, "mailbox_capacity").value if _library else 0


def available() -> bool:
    """Whether mailbox.c was built."""
    return _library is not None


def size_bytes(ranks: int) -> int:
    """What a mailbox of so many ranks takes."""
    return _library.mailbox_size(ranks)


class Mailbox:
    """Where the ranks of a group that are on one host leave rows of float64 for each other.

    addresses: of mailbox.c's mailbox_share and of the box, for C to add a row of up to CAPACITY values as `add` does.
        If that does not return 0, the message is to be gone on with by `finish`.

    Args:
        file: descriptor of their memory; it may be closed afterwards.
        nonce: what the memory begins with.
        rank: this one.
        ranks: all, by the numbers to name them by; rows are in this order.
        timeout_s: how long a message waits for a peer that lives.
        spin_ns: how long it does so without sleeping.

    Raises:
        OSError: the memory is another, or cannot be mapped.

    Collective: each method but close; every rank in the same order, with rows of the same length.
    """

    def __init__(self, file: int, nonce: bytes, rank: int, ranks: Sequence[int], timeout_s: float, spin_ns: int):
        self._box = _library.mailbox_open(file, nonce, ranks.index(rank), len(ranks), spin_ns)
        if self._box is None:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._ranks, self._timeout_s = ranks, timeout_s
        self._share = _library.mailbox_share
        self.addresses: tuple[int, int] = ctypes.cast(self._share, ctypes.c_void_p).value or 0, self._box
        self._finalizer = weakref.finalize(self, _library.mailbox_close, self._box)
        # A thread may still wait in it, and the process's end closes it as well
        self._finalizer.atexit = False
        _open.add(self)

    def add(self, row: Tensor) -> None:
        """Make row [n] the sum of all ranks' rows, by pairs in their order: the same bits everywhere, in all runs."""
        self._replace(row, _SUM)

    def take_first(self, row: Tensor) -> None:
        """Make row [n] the first rank's."""
        self._replace(row, _FIRST)

    def gather(self, row: Tensor) -> Tensor:
        """[W, n], each rank's row [n], in the order of ranks."""
        gathered = []
        for piece in _pieces(row):
            rows = piece.new_empty(len(self._ranks), piece.numel())
            self._send(piece.data_ptr(), piece.numel(), rows.data_ptr(), _ROWS)
            gathered.append(rows)
        return gathered[0] if len(gathered) == 1 else torch.cat(gathered, dim=1)

    def _replace(self, row: Tensor, what: int) -> None:
        for piece in _pieces(row):
            address = piece.data_ptr()
            self._send(address, piece.numel(), address, what)

    def _send(self, row: int, n: int, out: int, what: int) -> None:
        answer = self._share(self._box, row, n, out, what)
        if answer != _COMPLETE:
            self._finish(answer, n, out, what)

    def finish(self, answer: int, row: Tensor) -> None:
        """Make row the sum of a message whose share returned answer."""
        self._finish(answer, row.numel(), row.data_ptr(), _SUM)

    def close(self) -> None:
        """Leave: peers that wait for this rank are told, and its own messages raise."""
        self._box = None
        self.addresses = self.addresses[0], 0
        self._finalizer()

    def _finish(self, answer: int, n: int, out: int, what: int) -> None:
        """Wait, slice by slice, so that Python has its signals handled; a message that is not finished is the last."""
        deadline = monotonic() + self._timeout_s
        try:
            while answer == _WAITING:
                self._expect_peers(deadline)
                answer = _library.mailbox_finish(self._box, n, out, what)
            if answer == _LENGTHS_DIFFER:
                raise DistBackendError(self._lengths())
            if answer == _CLOSED:
                raise DistBackendError("shared memory was left: by this rank after an error, or it is a fork of one")
        except BaseException:
            self.close()
            raise

    def _expect_peers(self, deadline: float) -> None:
        peers = [(rank, _library.mailbox_peer(self._box, place)) for place, rank in enumerate(self._ranks)]
        if gone := [rank for rank, state in peers if state == _GONE]:
            raise DistBackendError(f"{_named(gone)} died or left in the middle of a message through shared memory")
        if monotonic() > deadline:
            late = _named([rank for rank, state in peers if state == _COMING])
            raise DistBackendError(f"timed out after {self._timeout_s:g} s: {late} did not come to a message")

    def _lengths(self) -> str:
        lengths = [_library.mailbox_length(self._box, place) for place in range(len(self._ranks))]
        sent = ", ".join(f"rank {rank} sent {length}" for rank, length in zip(self._ranks, lengths, strict=True))
        return f"ranks ran different layers: of the same message {sent} values"


def _pieces(row: Tensor) -> Sequence[Tensor]:
    """row in as many pieces as it takes slots."""
    assert row.dtype == torch.float64
    assert row.is_contiguous()
    return (row,) if row.numel() <= CAPACITY else row.split(CAPACITY)


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


_open: weakref.WeakSet[Mailbox] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """A fork of a rank, such as a loader's worker, is no rank; what it closes stays open in its parent."""
    for mailbox in list(_open):
        mailbox.close()


os.register_at_fork(after_in_child=_leave_to_parent)
