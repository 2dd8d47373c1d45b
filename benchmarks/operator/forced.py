"""One rank that sends its messages to itself: what synchronised batch norm does among many, on one GPU.

Alone, torch.nn.SyncBatchNorm and syncbn both are plain batch norm and send nothing. Here each is made to send:

    torch   TorchSyncBatchNorm calls the autograd function of torch.nn.SyncBatchNorm, which gathers and reduces whatever
            the world size is; that of one rank only makes its forward take the short way around
    syncbn  within `sending`, syncbn.collectives.resolve returns the operator's own communicator of one rank, where it
            would return None

The rest is as among many ranks: messages are packed, handed to the process group, taken apart, merged. Not so what
NCCL does with them: for one rank it launches nothing for an all_reduce in place (ours, and torch's backward), and one
copy for a gather (torch's forward); ncclLaunchOneRank in src/device/onerank.cu, https://github.com/NVIDIA/nccl. How
long messages take among GPUs is docs/scale.md's matter, and no figure made with this file tells it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as torch_sync_batch_norm

from benchmarks.measure.timing import Step
from syncbn import collectives
from syncbn.collectives import process_groups


@contextmanager
def world_of_one(device: str) -> Iterator[None]:
    """A default process group of this process alone, in which syncbn sends."""
    if device == "cuda":
        torch.cuda.set_device(0)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        with sending():
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def sending() -> Iterator[None]:
    """syncbn's layers send, though this process is the only one of its process group."""
    assert dist.get_world_size() == 1
    own = process_groups.current_world().own

    def resolve(key: str, samples: int = 0) -> Any:
        return own

    with patch.object(collectives, "resolve", resolve):
        yield


class TorchSyncBatchNorm(nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm that sends even to itself; in training, with a momentum."""

    def forward(self, x: Tensor) -> Tensor:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        buffers = self.running_mean, self.running_var
        world, size = dist.group.WORLD, dist.get_world_size()
        return torch_sync_batch_norm.apply(x, self.weight, self.bias, *buffers, self.eps, self.momentum, world, size)


def to_torch(model: nn.Module) -> nn.Module:
    """model with TorchSyncBatchNorm for batch norm, by torch's own conversion."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for layer in model.modules():
        if type(layer) is nn.SyncBatchNorm:
            layer.__class__ = TorchSyncBatchNorm
    return model


def messages(step: Step) -> int:
    """How many collectives step hands to its process group."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(event.name.startswith("c10d::") for event in profile.events() or ())
