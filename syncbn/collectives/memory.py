"""The memory through which ranks of a host send each other messages on CPUs, and hosts by their first ranks."""

import os
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup  # pyright: ignore[reportPrivateImportUsage]

from syncbn import shared_memory
from syncbn.collectives import log_time
from syncbn.collectives.world import ranks_of, timeout_of
from syncbn.shared_memory import Mailbox


class Memory(NamedTuple):
    """How a group's messages travel through memory.

    mailbox: of the ranks on this host; None if this rank is alone there.
    hosts: how many the group is on.
    leaders: connects the first rank of each of several hosts; None for the others.
    """

    mailbox: Mailbox | None
    hosts: int
    leaders: Any

    def add(self, message: Tensor) -> None:
        """Make message the sum of all ranks'."""
        if self.mailbox is not None:
            self.mailbox.add(message)
        if self.hosts == 1:
            return
        if self.leaders is not None:
            try:
                all_reduce(message, self.leaders)
            except BaseException:
                # The neighbours wait for what will not come
                if self.mailbox is not None:
                    self.mailbox.close()
                raise
        if self.mailbox is not None:
            self.mailbox.take_first(message)


# As long as their group: a new default group, after a restart, makes new ones
memories: WeakKeyDictionary[ProcessGroup, Memory | None] = WeakKeyDictionary()


def share_memory(group: ProcessGroup) -> None:
    """Agree with the group's other members, where that was not done, on the memory for messages on CPUs."""
    # While torch.compile traces, a process group may be a stand-in; then the first message agrees
    if not issubclass(type(group), ProcessGroup) or group in memories or group.size() == 1:
        return
    memories[group] = None
    if not _is_gloo(group):
        return
    ranks, rank, timeout = ranks_of(group), dist.get_rank(), timeout_of(group) or dist.default_pg_timeout
    crowd = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    gather = partial(log_time.gather_objects, group=group)
    agreement = shared_memory.agree(ranks, rank, crowd, timeout.total_seconds(), gather)
    if agreement is None:
        return
    leaders = None
    if rank in agreement.leaders and len(agreement.leaders) > 1:
        # Not by new_group, in which the whole world would have to take part
        everyones = dist.distributed_c10d._get_default_store()
        theirs = PrefixStore(f"syncbn/leaders/{agreement.name}", everyones)
        leaders = dist.ProcessGroupGloo(theirs, agreement.leaders.index(rank), len(agreement.leaders), timeout)
    memories[group] = Memory(agreement.mailbox, len(agreement.leaders), leaders)


def _is_gloo(group: ProcessGroup) -> bool:
    """Whether the ranks are real and talk over gloo where tensors are on CPUs."""
    try:
        return group._get_backend(torch.device("cpu")).name() == "gloo"
    except RuntimeError:
        return False


def _in_order() -> Any:
    options = dist.AllreduceOptions()
    # On the current stream, behind what made the message
    options.asyncOp = False
    return options


_IN_ORDER = _in_order() if dist.is_available() else None


def all_reduce(message: Tensor, group: Any) -> None:
    """dist.all_reduce less its checks, which cost the host more than the rest of it; for torch.compile, with them."""
    if torch.compiler.is_compiling():
        dist.all_reduce(message, group=group)
        return
    work = group.allreduce([message], _IN_ORDER)
    if work is not None:
        work.wait()
