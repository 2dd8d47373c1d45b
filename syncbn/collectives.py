"""Everything the operator says to other ranks, one message each way: by the backend, or through memory that they share.

Only one_shot.py also knows torch.distributed.
"""

import itertools
import os
import pickle
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh
from torch.fx.node import has_side_effect

from syncbn import groups, one_shot, shared_memory
from syncbn.one_shot import Mailboxes
from syncbn.shared_memory import Mailbox

Group = Literal["world", "node"] | int | Sequence[int] | ProcessGroup | DeviceMesh | Mapping[str, int]
"""Which ranks form one batch.

"world": all. "node": those of one machine. k: k consecutive ranks, 0 to k - 1, k to 2k - 1, ...; k divides the world.
Ranks: these; every rank gives the list that it is in. A ProcessGroup, or one dimension of a DeviceMesh, `mesh["data"]`:
its ranks. {"samples": n}: the fewest consecutive ranks whose batches hold n samples together, at the first forward.
"""

Reduction = Literal["auto", "all_reduce", "gather", "one_shot"]
"""How a group adds up its messages.

"auto": on CPUs, the ranks of one host read each other's messages out of memory that they share and add them up in the
order of ranks, by pairs; of several hosts, the first rank of each adds up with the others by all_reduce. On GPUs, under
torch.compile, and where no memory can be shared, it is "all_reduce". "all_reduce": by the backend's all_reduce, whose
message does not grow with the ranks. "gather": each rank's row reaches all and is merged in the order of ranks, the
same bits in every run and exact at any |mean| / sqrt(var); through shared memory where "auto" would use it, on one
host. "one_shot": as "gather", but inside a node each rank reads its peers' rows itself, out of symmetric memory, which
takes less time than NCCL needs to start; where the ranks are not on different GPUs of one node, and under
torch.compile, it is the backend's all_gather.
"""

Direction = Literal["forward", "backward"]

_torch: Any = torch


def checked(reduction: Reduction) -> Reduction:
    """reduction, or ValueError."""
    if reduction not in ("auto", "all_reduce", "gather", "one_shot"):
        raise ValueError(f"reduction is {reduction!r}: it must be 'auto', 'all_reduce', 'gather' or 'one_shot'")
    return reduction


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


class _World(NamedTuple):
    """The default group, our own communicator over its ranks, and what was agreed on in it."""

    default: ProcessGroup
    own: ProcessGroup
    communicators: dict[tuple[int, ...], ProcessGroup]
    formed: WeakKeyDictionary[Spec, ProcessGroup]
    mailboxes: Mailboxes


_world: _World | None = None


def available() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


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
    _share_memory(process_group)
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
    world = _current_world()
    if spec not in world.formed:
        places = gather_objects(groups.Place(spec.plain, socket.gethostname(), samples), world.own)
        division = groups.divide(places)
        for ranks in sorted(set(division)):
            if ranks not in world.communicators:
                world.communicators[ranks] = _new_group(ranks)
        world.formed[spec] = world.communicators[division[dist.get_rank()]]
    return world.formed[spec]


def _current_world() -> _World:
    global _world
    default = dist.group.WORLD
    assert default is not None
    # A new default group, after a restart, makes all else anew
    if _world is None or _world.default is not default:
        everyone = tuple(range(default.size()))
        own = _new_group(everyone)
        _world = _World(default, own, {everyone: own}, WeakKeyDictionary(), {})
    return _world


def _new_group(ranks: tuple[int, ...]) -> ProcessGroup:
    """A communicator of the operator's own, so that a message never queues behind DDP's gradient buckets.

    On NCCL it goes by the current stream, as all synchronous collectives of torch do, so there is no priority to set.
    """
    return dist.new_group(  # pyright: ignore[reportReturnType]
        ranks, timeout=_timeout(dist.group.WORLD), group_desc="syncbn"
    )


def _timeout(group: Any) -> timedelta | None:
    """What the user gave init_process_group, which new_group would not take over; None if the backend does not say."""
    # torch 2.15 has no public way
    try:
        return group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        return None


class _Memory(NamedTuple):
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
                _all_reduce(message, self.leaders)
            except BaseException:
                # The neighbours wait for what will not come
                if self.mailbox is not None:
                    self.mailbox.close()
                raise
        if self.mailbox is not None:
            self.mailbox.take_first(message)


# As long as their group: a new default group, after a restart, makes new ones
_memories: WeakKeyDictionary[ProcessGroup, _Memory | None] = WeakKeyDictionary()


def _share_memory(group: ProcessGroup) -> None:
    """Agree with the group's other members, where that was not done, on the memory for messages on CPUs."""
    # While torch.compile traces, a process group may be a stand-in; then the first message agrees
    if not issubclass(type(group), ProcessGroup) or group in _memories or group.size() == 1:
        return
    _memories[group] = None
    if not _is_gloo(group):
        return
    ranks, rank, timeout = ranks_of(group), dist.get_rank(), _timeout(group) or dist.default_pg_timeout
    crowd = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    gather = partial(gather_objects, group=group)
    agreement = shared_memory.agree(ranks, rank, crowd, timeout.total_seconds(), gather)
    if agreement is None:
        return
    leaders = None
    if rank in agreement.leaders and len(agreement.leaders) > 1:
        # Not by new_group, in which the whole world would have to take part
        everyones = dist.distributed_c10d._get_default_store()
        theirs = PrefixStore(f"syncbn/leaders/{agreement.name}", everyones)
        leaders = dist.ProcessGroupGloo(theirs, agreement.leaders.index(rank), len(agreement.leaders), timeout)
    _memories[group] = _Memory(agreement.mailbox, len(agreement.leaders), leaders)


def _is_gloo(group: ProcessGroup) -> bool:
    """Whether the ranks are real and talk over gloo where tensors are on CPUs."""
    try:
        return group._get_backend(torch.device("cpu")).name() == "gloo"
    except RuntimeError:
        return False


def _memory_for(message: Tensor, group: ProcessGroup, reduction: Reduction) -> _Memory | None:
    return _memories.get(group) if _may_share_memory(message, reduction) else None


def _may_share_memory(message: Tensor, reduction: Reduction) -> bool:
    return reduction in ("auto", "gather") and message.device.type == "cpu"


def gather_objects(value: Any, group: ProcessGroup | None) -> list[Any]:
    """Each rank's value, in rank order; for set-up and log time. Unlike torch's, it needs no numpy."""
    if group is None:
        return [value]
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    data = torch.tensor(list(pickle.dumps(value)), dtype=torch.uint8, device=device)
    sizes = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([data.numel()], device=device), group=group)
    longest = int(sizes.max())
    padded = torch.cat([data, data.new_zeros(longest - data.numel())])
    rows = padded.new_empty(group.size() * longest)
    dist.all_gather_into_tensor(rows, padded, group=group)
    pieces = zip(rows.view(-1, longest).tolist(), sizes.tolist(), strict=True)
    return [pickle.loads(bytes(row[:size])) for row, size in pieces]


def gather_rows(row: Tensor, group: ProcessGroup | None) -> Tensor:
    """[W, n], each rank's row, [n] on the CPU, in rank order; it waits for the host."""
    if group is None:
        return row.unsqueeze(0)
    sent = row.to("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    rows = sent.new_empty(group.size() * sent.numel())
    dist.all_gather_into_tensor(rows, sent, group=group)
    return rows.view(group.size(), -1).cpu()


def sum_rows(row: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over ranks of each one's row, of any shape, where it lies; for log time."""
    if group is None:
        return row
    sent = row.to("cuda" if dist.get_backend(group) == "nccl" else "cpu", copy=True)
    dist.all_reduce(sent, group=group)
    return sent.to(row.device)


def everyone() -> ProcessGroup | None:
    """The default group, for what is not a layer's message: those have the operator's own, and never meet it."""
    return dist.group.WORLD if available() else None


def ranks_of(group: ProcessGroup) -> tuple[int, ...]:
    """The ranks in the world of a group's members."""
    return tuple(dist.get_process_group_ranks(group))


def store() -> dist.distributed_c10d.Store:
    """The default group's store, through a connection of its own that a thread may block."""
    return dist.distributed_c10d._get_default_store().clone()


class Witness(Protocol):
    """Somebody who marks a layer's messages, to notice when ranks send those of different layers to each other.

    marks: whether its stamps travel.
    stamp: [2] float64, which travels with the message about to be sent; None on every rank: none does.
    received: is given the sum [2] of the stamps of the group's `size` ranks.
    """

    @property
    def marks(self) -> bool: ...
    def stamp(self, direction: Direction, group: ProcessGroup, device: torch.device) -> Tensor | None: ...
    def received(self, direction: Direction, stamps: Tensor | None, size: int) -> None: ...


class Exchange(NamedTuple):
    """How one layer's moments and gradient sums become those of its group."""

    group: ProcessGroup | None
    reduction: Reduction = "auto"
    witness: Witness | None = None

    @property
    def gathers(self) -> bool:
        """Whether each rank is told every rank's message, and not their sum."""
        return self.reduction in ("gather", "one_shot")


def form(exchange: Exchange) -> Literal["message", "row"]:
    """How this rank's moments are to be packed for share_moments."""
    return "row" if exchange.group is None or exchange.gathers else "message"


def share_moments(packed: Tensor, exchange: Exchange) -> Tensor:
    """The sum of all ranks' messages, in packed's place; of rows, or of a lone rank, all of them, [W, 2C + 1]."""
    return packed.unsqueeze(0) if exchange.group is None else _share(packed, exchange, "forward")


def share_sums(sums: Tensor, exchange: Exchange) -> Tensor:
    """[2C] the sum of all ranks' sums, which it may overwrite."""
    if exchange.group is None:
        return sums
    shared = _share(sums, exchange, "backward")
    return shared.sum(0) if exchange.gathers else shared


def refuse(channels: int, exchange: Exchange, device: torch.device) -> None:
    """Send NaN for moments, as this rank is about to raise: its peers are told, and none is left waiting."""
    if exchange.group is not None:
        _share(torch.full((2 * channels + 1,), torch.nan, dtype=torch.float64, device=device), exchange, "forward")


class Line(NamedTuple):
    """A message that C sends itself.

    addresses: of shared_memory's mailbox_share and of the mailbox; 0 for a lone rank, whose message goes nowhere.
    """

    addresses: tuple[int, int]
    mailbox: Mailbox | None
    exchange: Exchange
    direction: Direction

    def ended(self, answer: int = 0, row: Tensor | None = None) -> None:
        """To be called once C has tried. answer: what mailbox_share returned; if not 0, row becomes the sum yet."""
        group, _, witness = self.exchange
        if answer:
            assert self.mailbox is not None
            assert row is not None
            self.mailbox.finish(answer, row)
        if witness is not None and group is not None:
            witness.received(self.direction, None, group.size())


_NOWHERE = Line((0, 0), None, Exchange(None), "forward")


def line(exchange: Exchange, values: int, device: torch.device, direction: Direction) -> Line | None:
    """Where C may send a message of so many values, which then counts as sent; None where it goes another way."""
    group, reduction, witness = exchange
    if group is None:
        return _NOWHERE
    memory = _memories.get(group) if reduction == "auto" else None
    if memory is None or memory.hosts > 1 or values > shared_memory.CAPACITY or (witness and witness.marks):
        return None
    if witness is not None:
        witness.stamp(direction, group, device)
    assert memory.mailbox is not None
    return Line(memory.mailbox.addresses, memory.mailbox, exchange, direction)


def _share(message: Tensor, exchange: Exchange, direction: Direction) -> Tensor:
    """The sum over ranks of message [n], in its place; if exchange gathers, each rank's, [W, n]."""
    group, reduction, witness = exchange
    assert group is not None
    stamp = None if witness is None else witness.stamp(direction, group, message.device)
    if stamp is not None:
        message = torch.cat([message, stamp])
    shared = _gather(message, group, reduction) if exchange.gathers else _add(message, group, reduction)
    stamps = None
    if stamp is not None:
        shared, stamps = shared.split([message.numel() - 2, 2], dim=-1)
        stamps = stamps.sum(0) if exchange.gathers else stamps
    if witness is not None:
        witness.received(direction, stamps, group.size())
    return shared


def _add(message: Tensor, group: ProcessGroup, reduction: Reduction) -> Tensor:
    """The sum over ranks of message [n], in its place; compiled, perhaps not in its place."""
    if torch.compiler.is_compiling() and _may_share_memory(message, reduction):
        return torch.ops.syncbn.add(message, group.group_name)
    memory = _memory_for(message, group, reduction)
    if memory is None:
        _all_reduce(message, group)
    else:
        memory.add(message)
    return message


def _in_order() -> Any:
    options = dist.AllreduceOptions()
    # On the current stream, behind what made the message
    options.asyncOp = False
    return options


_IN_ORDER = _in_order() if dist.is_available() else None


def _all_reduce(message: Tensor, group: Any) -> None:
    """dist.all_reduce less its checks, which cost the host more than the rest of it; for torch.compile, with them."""
    if torch.compiler.is_compiling():
        dist.all_reduce(message, group=group)
        return
    work = group.allreduce([message], _IN_ORDER)
    if work is not None:
        work.wait()


def _gather(message: Tensor, group: ProcessGroup, reduction: Reduction) -> Tensor:
    """[W, n] each rank's message [n], in rank order."""
    if reduction == "one_shot" and _on_gpu(message) and not torch.compiler.is_compiling():
        mailbox = one_shot.mailbox(_current_world().mailboxes, group, message, gather_objects)
        if mailbox is not None:
            return mailbox.gather(message)
    if torch.compiler.is_compiling() and _may_share_memory(message, reduction):
        return torch.ops.syncbn.gather(message, group.group_name, group.size())
    memory = _memory_for(message, group, reduction)
    if memory is not None and memory.mailbox is not None and memory.hosts == 1:
        return memory.mailbox.gather(message)
    rows = message.new_empty(group.size() * message.numel())
    dist.all_gather_into_tensor(rows, message, group=group)
    return rows.view(group.size(), -1)


def _on_gpu(message: Tensor) -> bool:
    return message.is_cuda


def _by_name(name: Any) -> ProcessGroup:
    group = dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateImportUsage]
    _share_memory(group)
    return group


def _add_compiled(message: Tensor, group: str) -> Tensor:
    return _add(message.clone(), _by_name(group), "auto")


def _gather_compiled(message: Tensor, group: str, ranks: int) -> Tensor:
    return _gather(message, _by_name(group), "gather")


# A compiled message goes where it goes from a rank that does not compile: a recompilation too many makes one of those
_operators = torch.library.Library("syncbn", "DEF")


def _define(schema: str, in_run: Callable[..., Tensor], in_trace: Callable[..., Tensor]) -> None:
    name = _operators.define(schema)
    _operators.impl(name, in_run, "CPU")
    torch.library.register_fake(f"syncbn::{name}", in_trace, lib=_operators)
    # Peers wait for it, even if nobody here wants what it returns
    has_side_effect(getattr(torch.ops.syncbn, name).default)


_define("add(Tensor message, str group) -> Tensor", _add_compiled, lambda message, group: torch.empty_like(message))
_define(
    "gather(Tensor message, str group, int ranks) -> Tensor",
    _gather_compiled,
    lambda message, group, ranks: message.new_empty(ranks, message.numel()),
)


def summed(message: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of message over the group's ranks, which torch may differentiate and map in any way, any number of times.

    Collective: one all_reduce, and one for each backward through it; forward-mode AD sends one for the tangent. What
    is mapped travels as one message.
    """
    if not is_hidden_batch(message):
        return _Summed.apply(message, group)
    level = _torch._C._vmapmode_increment_nesting() - 1
    _torch._C._vmapmode_decrement_nesting()
    whole = _torch._remove_batch_dim(message, level, 1, 0)
    return _torch._add_batch_dim(summed(whole, group), 0, level)


def is_hidden_batch(tensor: Tensor) -> bool:
    """Whether tensor is of torch's older vmap, that of is_grads_batched, which knows no Function's own rule."""
    return _torch._C._functorch.is_legacy_batchedtensor(tensor)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(message: Tensor, group: ProcessGroup) -> Tensor:
        message = message.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(message, group=group)
        return message

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ProcessGroup], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return summed(gradient, ctx.group), None

    @staticmethod
    def jvp(ctx, tangent: Tensor, _):
        return summed(tangent, ctx.group)

    @staticmethod
    def vmap(info, in_dims: tuple[Any, ...], message: Tensor, group: ProcessGroup):
        return summed(message.movedim(in_dims[0], 0), group), 0
