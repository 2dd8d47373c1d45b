"""Which process group a layer sends to: how ranks ask for it, agree on it and form it."""

import itertools
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh

from syncbn import groups
from syncbn.collectives import log_time
from syncbn.collectives.memory import share_memory
from syncbn.collectives.one_shot import Mailboxes
from syncbn.collectives.world import available, timeout_of

Group = Literal["world", "node"] | int | Sequence[int] | ProcessGroup | DeviceMesh | Mapping[str, int]
"""Which ranks form one batch.

"world": all. "node": those of one machine. k: k consecutive ranks, 0 to k - 1, k to 2k - 1, ...; k divides the world.
Ranks: these; every rank gives the list that it is in. A ProcessGroup, or one dimension of a DeviceMesh, `mesh["data"]`:
its ranks. {"samples": n}: the fewest consecutive ranks whose batches hold n samples together, at the first forward.
"""


_keys = itertools.count()
_specs: WeakValueDictionary[str, "Spec"] = WeakValueDictionary()


class Spec:
    """A checked Group, as a layer keeps it: deep copies share it, and in a pickle ranks stand for a process group."""

    def __init__(self, group: Group):
        if isinstance(group, DeviceMesh) and group.ndim != 1:
            raise ValueError(f"group is a DeviceMesh of {group.ndim} dimensions: give one of them, as mesh['data']")
        self.group = group
        self.plain = None if isinstance(group, ProcessGroup | DeviceMesh) else groups.plain(group)
        self.key = str(next(_keys))
        # The default group in which `resolve` answered last, and the answer
        self.resolved: tuple[ProcessGroup | None, ProcessGroup | None] = (None, None)
        _specs[self.key] = self

    def handle(self) -> ProcessGroup:
        """The user's own process group; only where plain is None."""
        return self.group.get_group() if isinstance(self.group, DeviceMesh) else self.group  # pyright: ignore

    @property
    def by_samples(self) -> bool:
        """Whether `resolve` must know the size of the batch."""
        return isinstance(self.plain, tuple) and self.plain[0] == "samples"

    def __repr__(self) -> str:
        if self.plain is None and dist.is_initialized():
            return f"ProcessGroup of ranks {dist.get_process_group_ranks(self.handle())}"
        return repr(self.group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Spec":
        return self

    def __reduce__(self):
        return Spec, (self.group if self.plain is not None else tuple(dist.get_process_group_ranks(self.handle())),)


def check_group(group: Group) -> Group:
    """group, or ValueError where it is none, by itself: whether the ranks' fit together shows when they meet."""
    Spec(group)
    return group


class World(NamedTuple):
    """The default group, our own communicator over its ranks, and what was agreed on in it."""

    default: ProcessGroup
    own: ProcessGroup
    communicators: dict[tuple[int, ...], ProcessGroup]
    formed: WeakKeyDictionary[Spec, ProcessGroup]
    mailboxes: Mailboxes


_world: World | None = None


def resolve(key: str, samples: int = 0) -> ProcessGroup | None:
    """The process group that a Spec stands for, or None where this rank is alone or there is no process group.

    Args:
        key: the Spec's: a string, which every version of torch.compile takes for the constant that it is.
        samples: N of this rank's batch, for {"samples": n}.

    Raises:
        ValueError: the ranks' requests do not fit together; the same on every rank.
        RuntimeError: the process group given was destroyed.

    Collective: the first call with a Spec forms its group, so every rank of the world must make it, with a Spec that
    was not used before, in the same order. A ProcessGroup or DeviceMesh is there already: its members alone must make
    the first call with it, to agree on the memory that they share.
    """
    spec = _specs[key]
    default, process_group = spec.resolved
    if default is not None and default is dist.group.WORLD:
        return process_group
    if not available():
        if spec.plain is None:
            raise RuntimeError("the process group of this layer was destroyed: give it a new one, or revert the model")
        return None
    process_group = spec.handle() if spec.plain is None else _form(spec, samples)
    share_memory(process_group)
    spec.resolved = dist.group.WORLD, process_group if process_group.size() > 1 else None
    return spec.resolved[1]


_of_calls: dict[Any, Spec] = {}


def resolve_once(group: Group, samples: int) -> ProcessGroup | None:
    """resolve for a group that is asked for call by call, with no layer to keep its Spec."""
    spec = Spec(group)
    if spec.plain is not None:
        spec = _of_calls.setdefault(spec.plain, spec)
    return resolve(spec.key, samples)


# What torch.compiler.assume_constant_result does, without its import of the whole compiler (2 s, numpy, triton)
for function in resolve, resolve_once:
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _form(spec: Spec, samples: int) -> ProcessGroup:
    """The group of spec that this rank is in, once all ranks have said what they ask for."""
    world = current_world()
    if spec not in world.formed:
        places = log_time.gather_objects(groups.Place(spec.plain, socket.gethostname(), samples), world.own)
        division = groups.divide(places)
        for ranks in sorted(set(division)):
            if ranks not in world.communicators:
                world.communicators[ranks] = new_group(ranks)
        world.formed[spec] = world.communicators[division[dist.get_rank()]]
    return world.formed[spec]


def current_world() -> World:
    """The World of the default group that there is now. Collective where that is a new one: it makes a communicator."""
    global _world
    default = dist.group.WORLD
    assert default is not None
    # A new default group, after a restart, makes all else anew
    if _world is None or _world.default is not default:
        everyone = tuple(range(default.size()))
        own = new_group(everyone)
        _world = World(default, own, {everyone: own}, WeakKeyDictionary(), {})
    return _world


def new_group(ranks: tuple[int, ...]) -> ProcessGroup:
    """A communicator of the operator's own, so that a message never queues behind DDP's gradient buckets.

    On NCCL it goes by the current stream, as all synchronous collectives of torch do, so there is no priority to set.
    """
    return dist.new_group(  # pyright: ignore[reportReturnType]
        ranks, timeout=timeout_of(dist.group.WORLD), group_desc="syncbn"
    )
