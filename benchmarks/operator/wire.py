"""How many bytes a rank really sends, by the kernel's own count of the TCP sockets that it has open.

    python -m benchmarks wire        2, 4 and 8 ranks; the rank that sends most

torch.nn.SyncBatchNorm refuses CPU tensors, so its messages are sent in its stead; ours are those of the layer itself.
gloo sends an all_reduce around a ring, 2 (W - 1) / W of the message from each rank, and an all_gather W - 1 times.
"""

import argparse
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import ranks
from benchmarks.measure.records import Result
from syncbn import SyncBatchNorm, collectives

RANKS = (2, 4, 8)
WIDEST = 2048
# tcpi_bytes_sent and tcpi_bytes_retrans of struct tcp_info (include/uapi/linux/tcp.h), in Linux since 4.19
SENT, INFO_SIZE = 200, 216


def sent_bytes() -> int:
    """What this process's TCP sockets have sent since each was opened; what was sent again counts once."""
    total = 0
    for fd in filter(is_socket, map(int, os.listdir("/proc/self/fd"))):
        with socket.socket(fileno=os.dup(fd)) as twin:
            if twin.family in (socket.AF_INET, socket.AF_INET6) and twin.type == socket.SOCK_STREAM:
                info = twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_SIZE)
                if len(info) < INFO_SIZE:
                    raise RuntimeError(
                        f"TCP_INFO has {len(info)} bytes: it must have {INFO_SIZE}, as from Linux 4.19 on"
                    )
                sent, again = struct.unpack_from("QQ", info, SENT)
                total += sent - again
    return total


def is_socket(fd: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:  # closed meanwhile, as that of the listing is
        return False


def ours(rank: int, channels: Sequence[int], backward: bool) -> None:
    """The layer's own messages for layers of so many channels, one after the other."""
    for c in channels:
        x = torch.randn(2, c, 1, 1, requires_grad=True)
        y = SyncBatchNorm(c, group=dist.group.WORLD, reduction="all_reduce")(x)  # pyright: ignore[reportArgumentType]
        if backward:
            y.square().sum().backward()


def torchs(rank: int, channels: Sequence[int], backward: bool) -> None:
    """The messages of torch.nn.SyncBatchNorm."""
    for c in channels:
        row = torch.ones(2 * c + 1)
        dist.all_gather([torch.empty_like(row) for _ in range(dist.get_world_size())], row)
        if backward:
            dist.all_reduce(torch.ones(2 * c))


def counted(run: ranks.Run, send: Callable[..., Any], *args: Any) -> int:
    """Bytes that the rank that sends most sends in send(rank, *args)."""
    # Between calls nothing is under way: every rank has received all that it waited for
    before = run(count)
    run(send, *args)
    return max(now - then for now, then in zip(run(count), before, strict=True))


def count(rank: int) -> int:
    # What ranks agree on before their first message is no part of it
    collectives.resolve_once(dist.group.WORLD, 0)  # pyright: ignore[reportArgumentType]
    return sent_bytes()


def add_options(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def measure(options: argparse.Namespace) -> Iterator[Result]:
    """Both forms, for the widest layer's forward and for a step of ResNet-50."""
    from benchmarks.operator.scale import channels  # ranks, which import this file, need no torchvision

    cases = {f"{WIDEST} channels, forward": ([WIDEST], False), "ResNet-50, a step": (channels(), True)}
    for world in RANKS:
        with ranks.started(world) as run:
            for title, case in cases.items():
                mine, theirs = (counted(run, form, *case) for form in (ours, torchs))
                figures = {"ours, bytes": mine, "torch, bytes": theirs, "torch/ours": theirs / mine}
                yield Result("bytes that a rank sends over TCP (gloo)", {"ranks": world, "what": title}, figures)
