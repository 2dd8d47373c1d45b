"""The ranks of a job, and all that they say to each other outside of training."""

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from inspect import signature
from threading import Timer
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from syncbn.trainer import environment
from syncbn.trainer.environment import LaunchConfig
from syncbn.trainer.errors import USER_ERROR, UserError, some

# DDP's option to send rank 0's buffers before each forward; torch 2.15 renamed it
BROADCAST_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel.__init__).parameters
)

WORD = "syncbn/word"  # the store's key for what rank 0 says at the end
FAILURE = "syncbn/failure"  # the store's key for what the first rank to fail says
HEARING_S = 30  # how long rank 0 waits for the others to hear it
WAITING_S = 15  # for a rank to say that it waits for the others
MOST_HOSTS = 3  # told by name in one line


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

    def each(self, values: Tensor) -> list[Tensor]:
        """Each rank's vector, of any length, on every rank. Collective: every rank calls it with the same dtype."""
        lengths = torch.zeros(self.size, dtype=torch.int64, device=values.device)
        lengths[self.rank] = len(values)
        lengths = self.sum(lengths).tolist()
        padded = torch.cat([values, values.new_zeros(max(lengths) - len(values))])
        vectors = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(vectors, padded)
        return [vector[:length] for vector, length in zip(vectors, lengths, strict=True)]

    def on_rank_0(self, work: Callable[[], Any]) -> Any:
        """What work returns on rank 0, on every rank; if it fails, it does on all. Collective, but work is not."""
        with self.together():
            answer = work() if self.rank == 0 else None
        return self.from_rank_0(answer)

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
            text if [len(refusers)] == whole else f"{text} (on {places(refusers, hosts)})"
            for text, refusers in ranks.items()
        )
        or None
    )


def places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks in words, with their hosts if there are several of those: "ranks 2, 3 of host b". hosts: [W]."""
    of_host: dict[str, list[int]] = {}
    for rank in ranks:
        of_host.setdefault(hosts[rank] if len(set(hosts)) > 1 else "", []).append(rank)
    parts = [_ranks(on_host) + (f" of host {host}" if host else "") for host, on_host in of_host.items()]
    return some(parts, MOST_HOSTS, more="more hosts")


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


@cache
def meet() -> Store:
    """The store that all ranks share; process groups and the config travel over it. Where there is none, an end."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    meets = f"rank {environment.rank()} of {environment.size()} meets the others at {place}"
    meeting = f"{meets}, as RANK, WORLD_SIZE and MASTER_ADDR say"
    mend = "start them all; or, if a shell has kept these from elsewhere, unset RANK"
    waits = Timer(WAITING_S, lambda: print(f"{meeting}, and waits: {mend}", file=sys.stderr, flush=True))
    waits.daemon = True
    waits.start()
    try:
        store, _, _ = next(rendezvous("env://"))
        return store
    except (dist.DistError, ValueError) as error:
        why = str(error).splitlines()[0]
        print(f"error: {meeting}, and cannot ({why}): {mend}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    finally:
        waits.cancel()


def join(config: LaunchConfig, store: Store) -> World:
    """Make the default process group over the store: NCCL if the ranks are on GPUs, else gloo. Collective."""
    device = environment.choose_device(config)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(environment.threads(environment.local_size()))
        environment.schedule_as_batch()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=environment.rank(),
        world_size=environment.size(),
        device_id=device if device.type == "cuda" else None,
        timeout=timedelta(seconds=config.timeout_s),
    )
    return World(environment.rank(), environment.size(), device, config.timeout_s)


def word_of_rank_0(word: str, *, patience_s: float) -> str | None:
    """Rank 0's word, once it has come here too; None if it is gone, or does not come in time.

    Every rank calls it: none then ends before rank 0 is done, as a launcher ends all ranks as soon as one has ended.
    """
    store = meet()
    if environment.rank() == 0:
        with suppress(RuntimeError):
            store.set(WORD, word)
            # It may be this process that hosts the store
            if environment.size() > 1:
                store.wait([f"{WORD}/heard"], timedelta(seconds=HEARING_S))
        return word
    with suppress(RuntimeError):
        store.wait([WORD], timedelta(seconds=patience_s))
        word = store.get(WORD).decode()
        if store.add(f"{WORD}/hearers", 1) == environment.size() - 1:
            store.set(f"{WORD}/heard", "")
        return word
    return None


def first_failure(line: str) -> tuple[int, str]:
    """The first rank to fail and what it said; of this rank, which fails now and says the line, if it is the first."""
    first = f"{environment.rank()} {line}"
    if dist.is_initialized():
        with suppress(RuntimeError):
            first = meet().compare_set(FAILURE, "", first).decode()
    number, _, said = first.partition(" ")
    return int(number), said


def reported_failure() -> str | None:
    """What the first rank to fail said; None if none has failed. Not for a rank whose store may not answer."""
    with suppress(RuntimeError):
        if meet().check([FAILURE]):
            return meet().get(FAILURE).decode().partition(" ")[2]
    return None


def leave() -> None:
    """Take the process group apart, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
