"""A process that has imported what a rank imports, and becomes ranks by forking: each begins in milliseconds.

`import torch` and what DDP and the optimisers import with it take 3 to 6 s of CPU. The launcher starts a nursery at
once, so that this is done while it reads the config, and keeps it over the points of a sweep. The nursery itself
computes nothing and has one thread, so that its forks are as new. Linux, and ranks on CPUs; CUDA survives no fork.
"""

import importlib
import os
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import NamedTuple, NoReturn

from syncbn.trainer.errors import STOP_SIGNALS

ROOM_FOR_TITLE = 200
# What a process reads of its environment but once, as it begins: what the ranks are to have, unless the user has it
ENVIRONMENT = {
    # numpy would start threads as it is imported
    "OPENBLAS_NUM_THREADS": "1",
    # glibc then keeps freed activations instead of faulting their pages in anew each step
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
# What ranks import, some of it as they need it: DDP and the optimisers torch._dynamo, image data torchvision
IMPORTED = ("syncbn.trainer.rank.life", "syncbn.trainer.data.transforms", "torch._dynamo")


class Request(NamedTuple):
    """A rank to be: what it would have found if it had been started by a command."""

    argument: str
    environment: dict[str, str]
    folder: str


class Nursery:
    """The launcher's end of it."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        handed = theirs.fileno()
        command = [sys.executable, "-m", __name__, str(handed), " " * ROOM_FOR_TITLE]
        # Out of reach of the signals of a terminal and of whoever signals a group: they are for the launcher to pass on
        environment = {**ENVIRONMENT, **os.environ}
        self._process = Popen(command, pass_fds=[handed], start_new_session=True, stdin=DEVNULL, env=environment)
        theirs.close()
        self._ended: dict[int, int] = {}
        self._began = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_gone(self) -> bool:
        return self._process.poll() is not None

    def began(self) -> bool:
        """Whether it can start ranks at once, or is gone."""
        self._began = self._began or self._connection.poll()
        return self._began

    def start(self, argument: str, environment: dict[str, str]) -> "Fork":
        """A rank. EOFError or OSError if the nursery is gone."""
        self._connection.send(Request(argument, environment, os.getcwd()))
        while (pid := self._heard()) is None:
            pass
        return Fork(pid, self)

    def exit_code(self, pid: int) -> int | None:
        """Of a rank; negative for a signal's number, None while it runs."""
        try:
            while pid not in self._ended and self._connection.poll():
                self._heard()
        except EOFError:
            # Its ranks died with it
            return -signal.SIGKILL
        return self._ended.get(pid)

    def close(self) -> None:
        """End it, even while it imports; ranks that still run are killed."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _heard(self) -> int | None:
        """The pid of a rank that was started; else it was told that one has ended."""
        pid, exit_code = self._connection.recv()
        if exit_code is None:
            return pid
        self._ended[pid] = exit_code
        return None


class Fork(NamedTuple):
    """A rank that was forked, to be asked as subprocess.Popen is."""

    pid: int
    nursery: Nursery

    def poll(self) -> int | None:
        return self.nursery.exit_code(self.pid)


def serve(connection: Connection) -> Request | None:
    """Fork ranks as they are asked for. Returns, in each, what it is to be; and None at the launcher's end."""
    former = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    awake, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    with suppress(OSError):  # the launcher may be gone
        connection.send((0, 0))  # "begun": the end of no rank
    former[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready = wait([connection, awake])
        if awake in ready:
            os.read(awake, 4096)
            _tell_of_ends(connection)
        if connection not in ready:
            continue
        try:
            request = connection.recv()
        except EOFError:
            return None
        ready, begun = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.set_wakeup_fd(-1)
            os.close(ready)
            connection.close()
            os.close(awake)
            os.close(wakeup)
            for number, handler in former.items():
                signal.signal(number, handler)
            os.close(begun)
            return request
        os.close(begun)
        os.read(ready, 1)  # until it hears signals, which are sent to its group
        os.close(ready)
        connection.send((pid, None))


_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP, signal.SIGQUIT)


def _tell_of_ends(connection: Connection) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        connection.send((pid, os.waitstatus_to_exitcode(status)))


def become(request: Request) -> NoReturn:
    """Be the rank that was asked for, and end with it."""
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    from syncbn.trainer.rank import life

    sys.exit(life.as_rank(Path(request.argument), os.getppid()))


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    asked = serve(Connection(int(sys.argv[1])))
    if asked is not None:
        become(asked)
