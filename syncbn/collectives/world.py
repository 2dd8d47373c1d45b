"""The default process group, and what torch knows of any."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup  # pyright: ignore[reportPrivateImportUsage]


def available() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def everyone() -> ProcessGroup | None:
    """The default group, for what is not a layer's message: those have the operator's own, and never meet it."""
    return dist.group.WORLD if available() else None


def ranks_of(group: ProcessGroup) -> tuple[int, ...]:
    """The ranks in the world of a group's members."""
    return tuple(dist.get_process_group_ranks(group))


def store() -> dist.distributed_c10d.Store:
    """The default group's store, through a connection of its own that a thread may block."""
    return dist.distributed_c10d._get_default_store().clone()


def timeout_of(group: Any) -> timedelta | None:
    """What the user gave init_process_group, which new_group would not take over; None if the backend does not say."""
    # torch 2.15 has no public way
    try:
        return group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        return None
