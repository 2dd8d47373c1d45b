"""The messages of a layer, one each way: by the backend, or through memory that ranks share."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup  # pyright: ignore[reportPrivateImportUsage]
from torch.fx.node import has_side_effect

from syncbn import shared_memory
from syncbn.collectives import log_time, one_shot
from syncbn.collectives.memory import Memory, all_reduce, memories, share_memory
from syncbn.collectives.process_groups import current_world
from syncbn.shared_memory import Mailbox

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


def check_reduction(reduction: Reduction) -> Reduction:
    """reduction, or ValueError."""
    if reduction not in ("auto", "all_reduce", "gather", "one_shot"):
        raise ValueError(f"reduction is {reduction!r}: it must be 'auto', 'all_reduce', 'gather' or 'one_shot'")
    return reduction


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
    memory = memories.get(group) if reduction == "auto" else None
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
    shared = gather_message(message, group, reduction) if exchange.gathers else sum_message(message, group, reduction)
    stamps = None
    if stamp is not None:
        shared, stamps = shared.split([message.numel() - 2, 2], dim=-1)
        stamps = stamps.sum(0) if exchange.gathers else stamps
    if witness is not None:
        witness.received(direction, stamps, group.size())
    return shared


def sum_message(message: Tensor, group: ProcessGroup, reduction: Reduction) -> Tensor:
    """The sum over ranks of message [n], in its place; compiled, perhaps not in its place."""
    if torch.compiler.is_compiling() and may_share_memory(message, reduction):
        return torch.ops.syncbn.add(message, group.group_name)
    memory = _memory_for(message, group, reduction)
    if memory is None:
        all_reduce(message, group)
    else:
        memory.add(message)
    return message


def gather_message(message: Tensor, group: ProcessGroup, reduction: Reduction) -> Tensor:
    """[W, n] each rank's message [n], in rank order."""
    if reduction == "one_shot" and on_gpu(message) and not torch.compiler.is_compiling():
        mailbox = one_shot.mailbox_of(current_world().mailboxes, group, message, log_time.gather_objects)
        if mailbox is not None:
            return mailbox.gather(message)
    if torch.compiler.is_compiling() and may_share_memory(message, reduction):
        return torch.ops.syncbn.gather(message, group.group_name, group.size())
    memory = _memory_for(message, group, reduction)
    if memory is not None and memory.mailbox is not None and memory.hosts == 1:
        return memory.mailbox.gather(message)
    rows = message.new_empty(group.size() * message.numel())
    dist.all_gather_into_tensor(rows, message, group=group)
    return rows.view(group.size(), -1)


def on_gpu(message: Tensor) -> bool:
    return message.is_cuda


def _by_name(name: Any) -> ProcessGroup:
    group = dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateImportUsage]
    share_memory(group)
    return group


def _add_compiled(message: Tensor, group: str) -> Tensor:
    return sum_message(message.clone(), _by_name(group), "auto")


def _gather_compiled(message: Tensor, group: str, ranks: int) -> Tensor:
    return gather_message(message, _by_name(group), "gather")


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


def _memory_for(message: Tensor, group: ProcessGroup, reduction: Reduction) -> Memory | None:
    return memories.get(group) if may_share_memory(message, reduction) else None


def may_share_memory(message: Tensor, reduction: Reduction) -> bool:
    return reduction in ("auto", "gather") and message.device.type == "cpu"
