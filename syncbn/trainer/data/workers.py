"""Processes that load data: deaf to what is sent to a rank's whole process group, and gone with their rank."""

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from syncbn.trainer import world

# What launchers and schedulers end or warn a job with
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # prctl(2)
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
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        # multiprocessing makes a folder, which a killed worker leaves behind; its sockets need a short path
        if (scratch := world.scratch()) and len(scratch) < LONGEST:
            tempfile.tempdir = scratch
        Thread(target=self._end_when_told, daemon=True).start()
        if sys.platform == "linux" and self.is_parent:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            # Killed before that: torch's own look would take whoever is the parent now for the rank, for ever
            if os.getppid() != self.rank:
                os._exit(1)

    def _end_when_told(self) -> None:
        # multiprocessing's exit ends workers so, and waits for them for ever
        if hasattr(signal, "sigwaitinfo"):
            while signal.sigwaitinfo([signal.SIGTERM]).si_pid != self.rank:
                pass
        else:
            signal.sigwait([signal.SIGTERM])
        os._exit(0)


@contextmanager
def signals_held() -> Iterator[None]:
    """Keep the signals waiting while workers are started, which start with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
