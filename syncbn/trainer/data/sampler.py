"""Which samples each rank takes: pure functions of seed, epoch and position, whatever the number of ranks."""

from collections.abc import Iterator
from hashlib import blake2b

import torch

Key = tuple[int, int]
"""(epoch, index): names a sample as it is seen in one epoch, its augmentation included."""


def seed_of(*parts: int) -> int:
    """A seed for torch's generators that depends on every part."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


class TrainSampler:
    """An endless stream of this rank's batches, starting at any step.

    Step s of an epoch takes the next batch_per_rank * world_size * accumulate samples of that epoch's shuffle, so the
    samples of a step do not depend on how many ranks share them. An epoch ends where a whole step no longer fits.
    """

    def __init__(
        self,
        samples: int,
        *,
        batch_per_rank: int,
        rank: int,
        world_size: int,
        seed: int,
        accumulate: int = 1,
        start: int = 0,
    ):
        self.samples, self.seed, self.start = samples, seed, start
        self.batch_per_rank, self.rank = batch_per_rank, rank
        self.micro_batch = batch_per_rank * world_size
        self.step_size = self.micro_batch * accumulate
        self.steps_per_epoch = samples // self.step_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, step = divmod(self.start, self.steps_per_epoch)
        while True:
            order = self.shuffle(epoch)
            for begin in range(step * self.step_size, self.steps_per_epoch * self.step_size, self.micro_batch):
                mine = begin + self.rank * self.batch_per_rank
                yield [(epoch, index) for index in order[mine : mine + self.batch_per_rank]]
            epoch, step = epoch + 1, 0

    def shuffle(self, epoch: int) -> list[int]:
        """The order of all samples in an epoch."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        return torch.randperm(self.samples, generator=generator).tolist()


class EvalSampler:
    """This rank's share of every sample exactly once: no padding, nothing dropped, perhaps nothing at all."""

    def __init__(self, samples: int, *, batch_per_rank: int, rank: int, world_size: int):
        self.mine = range(rank, samples, world_size)
        self.batch_per_rank = batch_per_rank

    def __iter__(self) -> Iterator[list[Key]]:
        for begin in range(0, len(self.mine), self.batch_per_rank):
            yield [(0, index) for index in self.mine[begin : begin + self.batch_per_rank]]

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_per_rank)
