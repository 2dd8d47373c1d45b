"""How a world of ranks is divided into groups that each form one batch. Pure: nothing here communicates."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

NON_MEMBER = -100  # torch.distributed.GroupMember.NON_GROUP_MEMBER, what new_group gives to other ranks


class Place(NamedTuple):
    """What one rank tells the others when the world is divided.

    spec: what `plain` made of its request.
    host: the name of its machine.
    samples: N of its batch.
    """

    spec: Any
    host: str
    samples: int


def plain(group: Any) -> str | int | tuple:
    """The request as something to compare and send: "world", "node", k, ranks, or ("samples", n).

    Raises ValueError for anything else. What needs the other ranks to be known is for `divide` to check.
    """
    if isinstance(group, str) and group in ("world", "node"):
        return group
    if _is_count(group):
        return group
    if isinstance(group, Mapping) and set(group) == {"samples"} and _is_count(group["samples"]):
        return ("samples", group["samples"])
    if isinstance(group, Sequence) and group and all(isinstance(rank, int) for rank in group) and _differ(group):
        return tuple(sorted(group))
    if group == NON_MEMBER:
        raise ValueError(
            "this rank is not in the process group that it was given (torch.distributed.new_group returned -100 here): "
            "give each rank the group that it is in"
        )
    raise ValueError(
        f"group is {group!r}: give 'world', 'node', a number of ranks, a list of different ranks, {{'samples': n}}, "
        "a ProcessGroup that this rank is in or one dimension of a DeviceMesh"
    )


def divide(places: Sequence[Place]) -> list[tuple[int, ...]]:
    """The group of each rank, from what all ranks said; ValueError, the same on every rank, if they do not fit."""
    groups = [_ranks(rank, places) for rank in range(len(places))]
    for rank, group in enumerate(groups):
        for other in group:
            if groups[other] != group:
                raise ValueError(
                    f"rank {rank} forms a batch with ranks {list(group)}, but rank {other} with {list(groups[other])}: "
                    "a rank is in one group, and its members must ask for the same"
                )
    return groups


def group_size(
    group: str | int | Sequence[int] | Mapping[str, int], ranks: int, *, node_ranks: int = 1, samples: int = 0
) -> int:
    """How many of a job's ranks form one batch, for who plans a job that does not run yet.

    Args:
        group: see `syncbn.Group`; not a ProcessGroup or DeviceMesh, which know their own size.
        ranks: of the job.
        node_ranks: on each machine, for "node".
        samples: in each rank's batch, for {"samples": n}.

    Raises:
        ValueError: group is none, or does not divide so many ranks.

    Nothing is sent.
    """
    spec = plain(group)
    places = [Place(spec, str(rank // node_ranks), samples) for rank in range(ranks)]
    # The ranks of a list, which may leave rank 0 out
    members = spec if isinstance(spec, tuple) and spec[0] != "samples" else ()
    member = next((rank for rank in members if rank in range(ranks)), 0)
    return len(_ranks(member, places))


def _ranks(rank: int, places: Sequence[Place]) -> tuple[int, ...]:
    world, spec = len(places), places[rank].spec
    if spec == "world":
        return tuple(range(world))
    if spec == "node":
        return tuple(other for other, place in enumerate(places) if place.host == places[rank].host)
    if isinstance(spec, int):
        if world % spec:
            raise ValueError(f"group is {spec}: it must divide the number of ranks, {world}")
        return _consecutive(rank, spec)
    if spec[0] == "samples":
        return _consecutive(rank, _fewest(spec[1], places))
    if spec[-1] >= world or spec[0] < 0:
        raise ValueError(f"group is {list(spec)} on rank {rank}: the ranks are 0 to {world - 1}")
    if rank not in spec:
        raise ValueError(f"group is {list(spec)} on rank {rank}, which it leaves out: give each rank the one it is in")
    return spec


def _consecutive(rank: int, k: int) -> tuple[int, ...]:
    first = rank - rank % k
    return tuple(range(first, first + k))


def _fewest(samples: int, places: Sequence[Place]) -> int:
    """The smallest divisor k of the world such that every k ranks hold so many samples together; else the world."""
    world = len(places)
    for k in range(1, world):
        sums = [sum(place.samples for place in places[first : first + k]) for first in range(0, world, k)]
        if world % k == 0 and min(sums) >= samples:
            return k
    return world


def _differ(ranks: Sequence[int]) -> bool:
    return len(set(ranks)) == len(ranks)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
