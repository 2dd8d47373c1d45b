"""Who this process is among the ranks, and on which device; the only reader of the launcher's environment."""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from inspect import signature
from io import TextIOWrapper
from pathlib import Path
from threading import Timer
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from syncbn.trainer.errors import FAILED, USER_ERROR, UserError

# DDP's option to send rank 0's buffers before each forward; torch 2.15 renamed it
BROADCAST_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel.__init__).parameters
)

LONGEST_S = 7 * 24 * 3600
WORD = "syncbn/word"  # the store's key for what rank 0 says at the end
FAILURE = "syncbn/failure"  # the store's key for what the first rank to fail says
HEARING_S = 30  # how long rank 0 waits for the others to hear it
WAITING_S = 15  # for a rank to say that it waits for the others
MOST_HOSTS = 3  # told by name in one line
SCRATCH = "SYNCBN_SCRATCH"  # in the environment of processes that load data


@dataclass
class LaunchConfig:
    nproc: int | str = "auto"  # ranks that `python train.py` starts: auto is one per GPU, or 2 without GPUs
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one
    max_restarts: int = 0  # how often `python train.py` starts all ranks again when one dies; torchrun has its own
    timeout_s: float = 600.0  # how long ranks wait for one that does not come, before they end

    def __post_init__(self) -> None:
        if self.nproc != "auto" and not (isinstance(self.nproc, int) and self.nproc >= 1):
            raise UserError(f"launch.nproc={self.nproc}: give the number of ranks, 1 or more, or auto")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"launch.device={self.device}: choose one of auto, cpu, cuda")
        if self.max_restarts < 0:
            raise UserError(f"launch.max_restarts={self.max_restarts}: give 0 (never) or more")
        if not 1 <= self.timeout_s <= LONGEST_S:
            raise UserError(f"launch.timeout_s={self.timeout_s}: give from 1 to {LONGEST_S} seconds")


@dataclass(frozen=True)
class World:
    """This process's place among the ranks of the job, all of them in torch's default process group."""

    rank: int
    size: int
    device: torch.device
    timeout_s: float = 600.0

    def control(self) -> dist.ProcessGroup | None:
        """A new group on the CPU for what the host has to know; none where this rank is alone. Collective."""
        if self.size == 1:
            return None
        timeout = timedelta(seconds=self.timeout_s)
        return dist.new_group(backend="gloo", timeout=timeout)  # pyright: ignore[reportReturnType]

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value, on rank 0; an empty list elsewhere. Collective."""
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values)
        return values or []

    def everyone(self, value: Any) -> list[Any]:
        """Each rank's value, on every rank. Collective."""
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Collective."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor, in place. Collective: every rank calls it with the same shape and dtype."""
        dist.all_reduce(values)
        return values

    def copy_from_rank_0(self, tensors: list[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0. Collective."""
        with torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block of local work that succeeds on all ranks or on none: a UserError anywhere ends it everywhere.

        Collective: every rank must enter and leave the block; inside it, no collective may be called.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        said = self.everyone((error and f"{error}", socket.gethostname()))
        if error is not None and not isinstance(error, UserError):
            raise error
        if line := refusals(*zip(*said, strict=True)):
            raise UserError(line, on_every_rank=True)


def refusals(texts: Sequence[str | None], hosts: Sequence[str]) -> str | None:
    """What the ranks refuse, each with who does unless all do; None if none does. texts, hosts: [W]."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text is not None:
            ranks.setdefault(text, []).append(rank)
    whole = [len(texts)]
    return (
        "; ".join(
            text if [len(those)] == whole else f"{text} (on {places(those, hosts)})" for text, those in ranks.items()
        )
        or None
    )


def places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks in words, with their hosts if there are several of those: "ranks 2, 3 of host b". hosts: [W]."""
    of_host: dict[str, list[int]] = {}
    for rank in ranks:
        of_host.setdefault(hosts[rank] if len(set(hosts)) > 1 else "", []).append(rank)
    told = [_ranks(those) + (f" of host {host}" if host else "") for host, those in of_host.items()]
    return ", ".join(told[:MOST_HOSTS]) + (
        f" and {len(told) - MOST_HOSTS} more hosts" if len(told) > MOST_HOSTS else ""
    )


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def choose_device(config: LaunchConfig) -> torch.device:
    """The kind of device that the config means on this machine."""
    kind = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind)


def ranks_to_start(config: LaunchConfig) -> int:
    """How many ranks `python train.py` starts on this machine."""
    if isinstance(config.nproc, int):
        nproc = config.nproc
    else:
        nproc = torch.cuda.device_count() if choose_device(config).type == "cuda" else 2
    check_gpus(config, nproc)
    return nproc


def check_gpus(config: LaunchConfig, local_size: int) -> None:
    """Refuse more ranks on this machine than it has GPUs, if the ranks are to use GPUs."""
    if choose_device(config).type != "cuda":
        return
    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise UserError("launch.device=cuda and this machine has no GPU that torch can use: launch.device=cpu")
    if local_size > gpus:
        raise UserError(
            f"{local_size} ranks and {gpus} GPUs on this machine: launch.nproc={gpus}, or launch.device=cpu for more"
        )


def set_rank_environment(config: LaunchConfig, local_size: int) -> None:
    """Set what the ranks that this process is about to start should find in their environment."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads(local_size)))
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torch 2.15 loses the store in a restart otherwise


def set_scratch(folder: Path) -> None:
    """Tell the processes that this rank starts of a folder that is removed after it."""
    os.environ[SCRATCH] = str(folder)


def scratch() -> str | None:
    """A folder for temporary files that is removed even if this process is killed; None where there is none."""
    return os.environ.get(SCRATCH)


def threads(local_size: int) -> int:
    """CPU threads for each of so many ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_size)


def schedule_as_batch() -> None:
    """Ask Linux not to let one thread's waking preempt another: ranks and gloo's threads share the cores.

    Two ranks with SyncBatchNorm on two cores trained 1.3 to 1.8 times faster with it (benchmarks/RESULTS.md).
    """
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def print_any_text() -> None:
    """Print what the output's encoding lacks, × in ASCII say, as ?, instead of failing there."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def refuse_without_loopback() -> None:
    """Raise UserError if processes of this machine cannot connect to each other."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5):
            pass
    except OSError as error:
        raise UserError(
            f"ranks meet at 127.0.0.1, and nothing can connect there ({error.strerror or error}): ip link set lo up"
        ) from error


def under_torchrun() -> bool:
    """Whether a launcher made this process one rank of several, as torchrun does."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ


def rank() -> int:
    """This process's rank, before any process group exists; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """The number of ranks, before any process group exists; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarts() -> int:
    """How often the launcher has started the ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def end_with_launcher(launcher: int | None = None) -> None:
    """Have Linux kill this process when the one that started it is gone: no rank trains on by itself.

    launcher: its pid, by which it is noticed if it has gone already; None if that is not known.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if launcher is not None and os.getppid() != launcher:
            sys.exit(FAILED)


def show_title(title: str) -> None:
    """What `ps` shows of this process, as far as its command line had room for it (Linux)."""
    with suppress(OSError, ValueError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: 48 and 49 of proc(5)
        text = title.encode()[: end - start - 1]
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def local_size() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@cache
def meet() -> Store:
    """The store that all ranks share; process groups and the config travel over it. Where there is none, an end."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    told = f"rank {rank()} of {size()} meets the others at {place}, as RANK, WORLD_SIZE and MASTER_ADDR say"
    mend = "start them all; or, if a shell has kept these from elsewhere, unset RANK"
    waits = Timer(WAITING_S, lambda: print(f"{told}, and waits: {mend}", file=sys.stderr, flush=True))
    waits.daemon = True
    waits.start()
    try:
        store, _, _ = next(rendezvous("env://"))
        return store
    except (dist.DistError, ValueError) as error:
        why = str(error).splitlines()[0]
        print(f"error: {told}, and cannot ({why}): {mend}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    finally:
        waits.cancel()


def join(config: LaunchConfig, store: Store) -> World:
    """Make the default process group over the store: NCCL if the ranks are on GPUs, else gloo. Collective."""
    device = choose_device(config)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(threads(local_size()))
        schedule_as_batch()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank(),
        world_size=size(),
        device_id=device if device.type == "cuda" else None,
        timeout=timedelta(seconds=config.timeout_s),
    )
    return World(rank(), size(), device, config.timeout_s)


def word_of_rank_0(word: str, *, patience_s: float) -> str | None:
    """Rank 0's word, once it has come here too; None if it is gone, or does not come in time.

    Every rank calls it: none then ends before rank 0 is done, as a launcher ends all ranks as soon as one has ended.
    """
    store = meet()
    if rank() == 0:
        with suppress(RuntimeError):
            store.set(WORD, word)
            # It may be this process that hosts the store
            if size() > 1:
                store.wait([f"{WORD}/heard"], timedelta(seconds=HEARING_S))
        return word
    with suppress(RuntimeError):
        store.wait([WORD], timedelta(seconds=patience_s))
        word = store.get(WORD).decode()
        if store.add(f"{WORD}/hearers", 1) == size() - 1:
            store.set(f"{WORD}/heard", "")
        return word
    return None


def first_failure(line: str) -> tuple[int, str]:
    """The first rank to fail and what it said; of this rank, which fails now and says the line, if it is the first."""
    first = f"{rank()} {line}"
    if dist.is_initialized():
        with suppress(RuntimeError):
            first = meet().compare_set(FAILURE, "", first).decode()
    number, _, said = first.partition(" ")
    return int(number), said


def failure_told() -> str | None:
    """What the first rank to fail said; None if none has failed. Not for a rank whose store may not answer."""
    with suppress(RuntimeError):
        if meet().check([FAILURE]):
            return meet().get(FAILURE).decode().partition(" ")[2]
    return None


def leave() -> None:
    """Take the process group apart, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
