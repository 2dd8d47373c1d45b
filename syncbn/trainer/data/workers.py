"""Processes that load data: deaf to what is sent to a rank's whole process group, and gone with their rank."""

import ctypes
import errno
import multiprocessing
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.queues import Queue
from threading import Thread
from typing import Any

from torch.distributed import DistError

from syncbn.trainer import environment
from syncbn.trainer.errors import FAILED, STOP_SIGNALS, UserError

# What launchers and schedulers end or warn a job with
PR_SET_PDEATHSIG = 1  # prctl(2)
SHARED = "/dev/shm"
LONGEST = 107 - len("/pymp-12345678/listener-12345678")  # what unix(7) has for a path, without multiprocessing's part


class HeedRankAlone:
    """A DataLoader's worker_init_fn, made in the rank: SIGTERM ends the worker only if the rank itself sent it.

    A signal to the process group is the rank's to act on, which still wants its batches to finish the step. On Linux
    the kernel kills the worker with the rank; elsewhere torch's workers look for it every 5 s.
    """

    def __init__(self) -> None:
        self.rank = os.getpid()
        self.is_parent = multiprocessing.get_start_method() != "forkserver"

    def __call__(self, worker: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        Queue._on_queue_feeder_error = _send_the_error  # pyright: ignore[reportAttributeAccessIssue]
        # multiprocessing makes a folder, which a killed worker leaves behind; its sockets need a short path
        if (scratch := environment.scratch()) and len(scratch) < LONGEST:
            tempfile.tempdir = scratch
        Thread(target=self._end_when_asked, daemon=True).start()
        if sys.platform == "linux" and self.is_parent:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            # Killed before that: torch's own look would take whoever is the parent now for the rank, for ever
            if os.getppid() != self.rank:
                os._exit(1)

    def _end_when_asked(self) -> None:
        # multiprocessing's exit ends workers so, and waits for them for ever
        if hasattr(signal, "sigwaitinfo"):
            while signal.sigwaitinfo([signal.SIGTERM]).si_pid != self.rank:
                pass
        else:
            signal.sigwait([signal.SIGTERM])
        os._exit(0)


def _send_the_error(queue: Queue, error: Exception, item: tuple[int, Any]) -> None:
    """Answer for a batch that cannot be sent, for which the rank would wait for ever. item: its number, and itself."""
    number, batch = item
    if isinstance(batch, UserError):  # nothing more can be said
        os._exit(FAILED)
    queue.put((number, no_shared_memory(error) or UserError(f"a batch cannot be sent by its worker ({error})")))


def no_shared_memory(error: BaseException) -> UserError | None:
    """What to say if there is no room for the batches of workers, which go through /dev/shm; None: it is another."""
    lacking = isinstance(error, OSError) and error.errno == errno.ENOSPC
    mentioned = re.search("shared memory|No space left on device|Bus error", str(error))
    # Messages of ranks go through shared memory as well, and fail otherwise
    if isinstance(error, DistError) or not (lacking or mentioned):
        return None
    size = ""
    with suppress(OSError):
        place = os.statvfs(SHARED)
        size = f" ({place.f_blocks * place.f_frsize / 2**20:.0f} MB)"
    return UserError(
        f"{SHARED}{size} has no room for the batches that workers send: data.workers=0 sends none, or give it more, "
        "in a container with docker run --shm-size=8g"
    )


@contextmanager
def signals_held() -> Iterator[None]:
    """Keep the signals waiting while workers are started, which start with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
