"""Collectives of set-up and log time, which wait for the host."""

import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup  # pyright: ignore[reportPrivateImportUsage]


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
