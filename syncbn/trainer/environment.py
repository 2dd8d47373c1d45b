"""What surrounds this process: the launcher's variables, devices, threads, the terminal. Their only reader."""

import ctypes
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

import torch

from syncbn.trainer.errors import FAILED, UserError
from syncbn.trainer.option import option

LONGEST_S = 7 * 24 * 3600
SCRATCH = "SYNCBN_SCRATCH"  # in the environment of processes that load data


@dataclass
class LaunchConfig:
    """How ranks start and wait. job/ alone reads max_restarts; its key is here as config.py, below job/, gathers it."""

    nproc: int | str = option("auto", "ranks that `python train.py` starts: auto is one per GPU, or 2 without GPUs")
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")
    max_restarts: int = option(
        0, "how often `python train.py` starts all ranks again when one dies; torchrun has its own"
    )
    timeout_s: float = option(600.0, "how long ranks wait for one that does not come, before they end")

    def __post_init__(self) -> None:
        if self.nproc != "auto" and not (isinstance(self.nproc, int) and self.nproc >= 1):
            raise UserError(f"launch.nproc={self.nproc}: give the number of ranks, 1 or more, or auto")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"launch.device={self.device}: choose one of auto, cpu, cuda")
        if self.max_restarts < 0:
            raise UserError(f"launch.max_restarts={self.max_restarts}: give 0 (never) or more")
        if not 1 <= self.timeout_s <= LONGEST_S:
            raise UserError(f"launch.timeout_s={self.timeout_s}: give from 1 to {LONGEST_S} seconds")


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


def local_size() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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
