"""The ranks that `python train.py` starts on its machine: a process each, watched until all ended or one failed."""

import atexit
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from syncbn.trainer.errors import FAILED, RanksFailed
from syncbn.trainer.job.nursery import Nursery

LOOK_EVERY_S = 0.05
# That ranks have to end by themselves once one has failed, or a signal was passed on to them
PATIENCE_S = 30.0


class Rank(Protocol):
    """A process, as subprocess.Popen has it."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...


CAN_FORK = sys.platform == "linux"

# By the pid of this process, whose forks have none
_nurseries: dict[int, Nursery] = {}


def prepare() -> None:
    """Begin to import what ranks will need, beside whatever else is to be done before they start."""
    nursery = _nurseries.get(os.getpid())
    if nursery is None or nursery.is_gone():
        _nurseries[os.getpid()] = Nursery()


def prepare_early() -> None:
    """prepare, where a run is likely to begin soon, and on CPUs."""
    asks = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--version"}
    if CAN_FORK and not asks & set(sys.argv[1:]) and not os.path.exists("/dev/nvidiactl"):
        prepare()


@atexit.register
def _close_nursery() -> None:
    if nursery := _nurseries.pop(os.getpid(), None):
        nursery.close()


class Ends(NamedTuple):
    """How the ranks ended.

    exit_codes: of each rank; negative for a signal's number.
    signalled: the first signal that was passed on to them, if any.
    stopped: the ranks that still ran when this process began to end all.
    out_of_memory: whether the kernel has ended a process meanwhile, as memory ran out.
    """

    exit_codes: dict[int, int]
    signalled: signal.Signals | None
    stopped: frozenset[int] = frozenset()
    out_of_memory: bool = False


def run_ranks(argument: str, nproc: int, signals: Sequence[signal.Signals], *, forked: bool) -> Ends:
    """Run the trainer with this argument on nproc ranks, and wait for their ends.

    signals: passed on to the ranks, which then have PATIENCE_S; so have the others when one fails.
    forked: from a nursery, as ranks on CPUs can be; else each is a command of its own.
    """
    # The launcher's, so that it outlives any rank
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if forked:
        prepare()
    ranks: list[Rank] = []
    stopped: frozenset[int] = frozenset()
    oom_kills = _oom_kills()
    with _noted(signals) as received:
        try:
            while forked and not received and not _nurseries[os.getpid()].began():
                time.sleep(LOOK_EVERY_S)
            for rank in range(0 if received else nproc):
                environment = {**os.environ, **_place(rank, nproc, store.port)}
                ranks.append(_start(argument, environment, forked))
            while not received and not _over(ranks):
                time.sleep(LOOK_EVERY_S)
        finally:
            stopped = frozenset(rank for rank, process in enumerate(ranks) if process.poll() is None)
            _end(ranks, received)
    codes = {rank: process.poll() for rank, process in enumerate(ranks)}
    ends = {rank: -signal.SIGKILL if code is None else code for rank, code in codes.items()}
    return Ends(ends, received[0] if received else None, stopped, _oom_kills() > oom_kills)


def _oom_kills() -> int:
    """How many processes the kernel has ended as memory ran out: in this one's cgroup, else on the machine."""
    for path in _oom_counters():
        with suppress(OSError):
            if counted := re.search(r"^oom_kill (\d+)$", path.read_text(), re.M):
                return int(counted[1])
    return 0


def _oom_counters() -> Iterator[Path]:
    """Where Linux may count them; "0::" begins the line of cgroup v2, which has one tree for all controllers."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if not controllers:
                yield Path(f"/sys/fs/cgroup{place}/memory.events")
            elif "memory" in controllers.split(","):
                yield Path(f"/sys/fs/cgroup/memory{place}/memory.oom_control")
    yield Path("/proc/vmstat")


def _place(rank: int, nproc: int, port: int) -> dict[str, str]:
    """What torch's launchers tell a rank in its environment."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_PORT": port}
    texts = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return {name: str(number) for name, number in numbers.items()} | texts


def _start(argument: str, environment: dict[str, str], forked: bool) -> Rank:
    if forked:
        try:
            return _nurseries[os.getpid()].start(argument, environment)
        except (EOFError, OSError):
            raise RanksFailed("what ranks are forked from has ended: its own error says why", FAILED) from None
    command = [sys.executable, "-m", "syncbn.trainer.rank.life", argument, str(os.getpid())]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _over(ranks: Sequence[Rank]) -> bool:
    """Whether all have ended, or one has failed."""
    codes = [rank.poll() for rank in ranks]
    return any(codes) or None not in codes


def _end(ranks: Sequence[Rank], received: Sequence[signal.Signals]) -> None:
    """Wait for the end of all; those that run are told, killed, and given up if the kernel cannot end them."""
    deadline = time.monotonic() + PATIENCE_S
    passed_on = 0
    _signal(ranks, received[0] if received else signal.SIGTERM)
    while any(rank.poll() is None for rank in ranks):
        if time.monotonic() > deadline + PATIENCE_S:
            return
        if time.monotonic() > deadline:
            _signal(ranks, signal.SIGKILL)
        for number in received[max(1, passed_on) :]:
            _signal(ranks, number)
        passed_on = len(received)
        time.sleep(LOOK_EVERY_S)


def _signal(ranks: Sequence[Rank], number: signal.Signals) -> None:
    """SIGTERM in place of SIGINT: a rank heeds both alike, but at its start, where Python would show a traceback."""
    number = signal.SIGTERM if number == signal.SIGINT else number
    for rank in ranks:
        if rank.poll() is None:
            with suppress(ProcessLookupError):
                # The processes that load its data, too
                os.killpg(rank.pid, number)


@contextmanager
def _noted(signals: Sequence[signal.Signals]) -> Iterator[list[signal.Signals]]:
    """The signals of these that come meanwhile."""
    received: list[signal.Signals] = []
    former = {each: signal.signal(each, lambda number, _: received.append(signal.Signals(number))) for each in signals}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
