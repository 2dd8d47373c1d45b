"""Messages inside one node without NCCL: each rank leaves its row in memory that its peers read, over NVLink.

torch.ops.symm_mem.one_shot_all_reduce does the same for float32; a sum of float32 would lose what float64 messages are
for, so here rows are gathered, and added up or merged in the order of ranks: the same bits on every rank, in every run.
"""

import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class Mailbox:
    """Where the ranks of a group leave rows of float64 for each other.

    handle: of symmetric memory, as torch's `rendezvous` gives it.
    """

    def __init__(self, handle: Any):
        self._handle = handle
        self._rows: dict[int, list[Tensor]] = {}

    def gather(self, row: Tensor) -> Tensor:
        """[W, n], each rank's row [n], in rank order. No host wait, and it may be captured in a CUDA graph.

        Collective: every rank of the group, with rows of the same length.
        """
        rows = self._rows.get(row.numel())
        if rows is None:
            ranks = range(self._handle.world_size)
            rows = [self._handle.get_buffer(rank, [row.numel()], torch.float64) for rank in ranks]
            self._rows[row.numel()] = rows
        # A peer may still be reading what was here before
        self._handle.barrier(channel=0)
        rows[self._handle.rank].copy_(row)
        self._handle.barrier(channel=0)
        return torch.stack(rows)


Mailboxes = dict[tuple[ProcessGroup, int], Mailbox | None]


def mailbox_of(
    opened: Mailboxes, group: ProcessGroup, row: Tensor, gather_objects: Callable[[Any, ProcessGroup], list[Any]]
) -> Mailbox | None:
    """The group's mailbox for rows such as this, or None where its ranks are not on different GPUs of one node.

    Collective: the first call for a power of two opens it, and waits for the host.
    """
    capacity = max(1024, 1 << (row.numel() - 1).bit_length())
    if (group, capacity) not in opened:
        gpus = gather_objects((socket.gethostname(), _gpu(row.device)), group)
        mailbox = None
        if len({host for host, _ in gpus}) == 1 and len(set(gpus)) == len(gpus):
            try:
                mailbox = Mailbox(_symmetric_memory(group, capacity, row.device))
            except RuntimeError as error:
                warnings.warn(f"no symmetric memory between these GPUs, so moments are gathered: {error}", stacklevel=2)
        on_every_rank = all(gather_objects(mailbox is not None, group))
        opened[group, capacity] = mailbox if on_every_rank else None
    return opened[group, capacity]


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _symmetric_memory(group: ProcessGroup, capacity: int, device: torch.device) -> Any:
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory.rendezvous(symmetric_memory.empty(capacity, dtype=torch.float64, device=device), group)
