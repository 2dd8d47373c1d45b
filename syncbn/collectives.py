"""Everything the operator says to other ranks: one all_reduce of one message. No other operator file knows them."""

from typing import Literal

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Group = Literal["world"] | ProcessGroup
"""Which ranks form one batch: "world" is every rank of the default process group, over a communicator of our own."""

# The default group that existed when ours was made, and ours: a new default group (a restart) makes a new one.
_own: tuple[ProcessGroup, ProcessGroup] | None = None


def resolve(group: Group) -> ProcessGroup | None:
    """The process group that `group` stands for now, or None where this rank is alone.

    Raises ValueError, on every rank, for a group of another kind.

    Collective: the first call for "world" makes a communicator, so every rank must make it, in the same order.
    """
    if group != "world" and not isinstance(group, ProcessGroup):
        raise ValueError(f"group is {group!r}: give 'world' or a torch.distributed.ProcessGroup")
    if not (dist.is_available() and dist.is_initialized()):
        return None
    process_group = group if isinstance(group, ProcessGroup) else _communicator()
    return process_group if process_group.size() > 1 else None


# What torch.compiler.assume_constant_result does, without its import of the whole compiler (2 s, numpy, triton)
resolve._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def all_reduce(message: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum the message over the group's ranks, in place; alone, it is the sum already."""
    if group is not None:
        dist.all_reduce(message, group=group)
    return message


def _communicator() -> ProcessGroup:
    global _own
    world = dist.group.WORLD
    assert world is not None
    if _own is None or _own[0] is not world:
        _own = world, _new_group(world)
    return _own[1]


def _new_group(world: ProcessGroup) -> ProcessGroup:
    """A communicator of the world's ranks, so that a message never queues behind DDP's gradient buckets."""
    options = None
    if dist.get_backend(world) == "nccl":
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    group = dist.new_group(pg_options=options, group_desc="syncbn")
    assert isinstance(group, ProcessGroup)  # every rank of the world is in it
    return group
