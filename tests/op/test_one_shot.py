"""reduction="one_shot": rows left in memory that the peers read. A file that ranks share plays the part of the GPUs."""

import os
import tempfile
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from syncbn.collectives import gather_objects, one_shot
from syncbn.collectives.one_shot import Mailbox
from tests.op.steps import EXACT, batch, joined, layer_of, train_layer, whole_batch
from tests.ranks import run_ranks

CAPACITY = 64


class SharedFile:
    """What a handle of symmetric memory does, on a file: every rank's buffer, one after the other."""

    def __init__(self, path, rank, world_size):
        self.rank, self.world_size = rank, world_size
        self.memory = torch.from_file(path, shared=True, size=world_size * CAPACITY, dtype=torch.float64)

    def get_buffer(self, rank, sizes, dtype):
        assert dtype == torch.float64
        return self.memory[rank * CAPACITY :][: sizes[0]]

    def barrier(self, channel):
        assert channel == 0
        dist.barrier()


def many_messages(rank, path, lengths):
    mailbox = Mailbox(SharedFile(path, rank, dist.get_world_size()))
    wrong = []
    for turn, length in enumerate(lengths):
        rows = mailbox.gather(torch.full((length,), 10.0 * turn + rank, dtype=torch.float64))
        want = 10.0 * turn + torch.arange(dist.get_world_size())
        if not torch.equal(rows, want.double().view(-1, 1).expand(-1, length)):
            wrong.append((turn, rows))
    return wrong


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_reads_every_message_and_none_too_early_or_too_late(world_size):
    lengths = [7, 7, 64, 1, 7] * 60
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "memory")
        torch.from_file(path, shared=True, size=world_size * CAPACITY, dtype=torch.float64).fill_(torch.nan)
        assert run_ranks(many_messages, world_size, path, lengths) == [[]] * world_size


def by_one_shot(rank, path, layer, *args):
    """A training step whose messages go by the mailbox, and how long they were."""
    layer.eval()._process_group(torch.zeros(0))  # a gather of its own forms the group
    sent = []

    def gather(row):
        sent.append(row.numel())
        return real.gather(row)

    real = Mailbox(SharedFile(path, rank, dist.get_world_size()))
    box = type("Box", (), {"gather": staticmethod(gather)})
    with (
        patch.object(one_shot, "mailbox_of", lambda *_: box),
        patch("syncbn.collectives.messages.on_gpu", lambda message: True),
        patch.object(dist, "all_gather_into_tensor", side_effect=AssertionError),
    ):
        return train_layer(rank, layer, *args), sent


@pytest.mark.parametrize("split", [[5, 3], [3, 1, 0, 4]], ids=str)
def test_a_step_by_one_shot_equals_the_whole_batch(split):
    x, dy = batch((3, 4, 2))
    layer = layer_of(3, reduction="one_shot")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "memory")
        torch.from_file(path, shared=True, size=len(split) * CAPACITY, dtype=torch.float64).fill_(torch.nan)
        ranks = run_ranks(by_one_shot, len(split), path, layer, x.split(split), dy.split(split))

    assert [sent for _, sent in ranks] == [[7, 6]] * len(split)
    assert_close(joined([results for results, _ in ranks]), whole_batch(layer, x, dy), **EXACT)


@pytest.mark.parametrize("split", [[5, 3], [8, 0]], ids=str)
def test_without_gpus_it_is_gather(split):
    x, dy = batch((3, 4, 2))
    layer = layer_of(3, reduction="gather")
    by_gather = run_ranks(train_layer, 2, layer, x.split(split), dy.split(split))
    layer.reduction = "one_shot"
    shots = run_ranks(train_layer, 2, layer, x.split(split), dy.split(split))
    for gathered, shot in zip(by_gather, shots, strict=True):
        assert_close(shot["y"], gathered["y"], rtol=0, atol=0)
        assert_close(shot["buffers"], gathered["buffers"], rtol=0, atol=0)


def opened(rank, gpus, refusing):
    """Whether a mailbox is opened where rank r is on gpus[r], a host and a GPU, and some ranks' GPUs refuse."""
    host, gpu = gpus[rank]

    def memory(*_):
        if rank in refusing:
            raise RuntimeError("no peer access")
        return SharedFile

    with (
        patch("socket.gethostname", lambda: host),
        patch.object(one_shot, "_gpu", lambda device: gpu),
        patch.object(one_shot, "_symmetric_memory", memory),
    ):
        boxes = {}
        rows = torch.zeros(3), torch.zeros(1000)
        first, second = (one_shot.mailbox_of(boxes, dist.group.WORLD, row, gather_objects) for row in rows)
    return first is not None and first is second


@pytest.mark.filterwarnings("ignore:no symmetric memory")
@pytest.mark.parametrize(
    ("gpus", "refusing", "want"),
    [
        ([("n0", "a"), ("n0", "b")], [], True),
        ([("n0", "a"), ("n1", "a")], [], False),
        ([("n0", "a"), ("n0", "a")], [], False),
        ([("n0", "a"), ("n0", "b")], [1], False),
    ],
    ids=["one-node", "two-nodes", "one-gpu", "one-rank-refuses"],
)
def test_a_mailbox_is_for_different_gpus_of_one_node_and_for_all_ranks_or_none(gpus, refusing, want):
    assert run_ranks(opened, 2, gpus, refusing) == [want] * 2
