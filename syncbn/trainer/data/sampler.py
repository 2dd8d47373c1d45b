"""Which samples each rank takes: pure functions of seed, epoch and position, whatever the number of ranks."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import torch

Key = tuple[int, int]
"""(epoch, index): names a sample as it is seen in one epoch, its augmentation included."""


def seed_of(*parts: int) -> int:
    """A seed for torch's generators that depends on every part."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def slice_of(global_batch: int, rank: int, world_size: int) -> range:
    """The places of one forward's samples that a rank takes: consecutive, and as even as can be.

    If the ranks cannot have equally many, they have whole pairs of neighbours, which mixup joins: perhaps none. (Equal
    shares of an odd number split pairs, so that mixup then depends on the number of ranks, as nothing else does.)
    """
    if global_batch % world_size == 0:
        begin, end = (r * global_batch // world_size for r in (rank, rank + 1))
        return range(begin, end)
    least, more = divmod(-(-global_batch // 2), world_size)
    # The last pair may be half a pair, so the last ranks take one more; but rank 0 is never the one without any
    first_to_take_more = world_size - more if least else 0
    begin, end = (
        min(global_batch, 2 * (least * r + min(more, max(0, r - first_to_take_more)))) for r in (rank, rank + 1)
    )
    return range(begin, end)


class TrainSampler:
    """An endless stream of this rank's batches, starting at any step.

    Step s of an epoch takes the next global_batch * accumulate samples of that epoch's shuffle, so the samples of a
    step do not depend on how many ranks share them. An epoch ends where a whole step no longer fits.

    Args:
        groups: of each sample; the samples of an epoch are then ordered so that those of a global batch are of one
            group, as far as each group fills whole ones. None: they are as they are drawn.
    """

    def __init__(
        self,
        samples: int,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        accumulate: int = 1,
        start: int = 0,
        groups: Sequence[int] | None = None,
    ):
        self.groups = groups
        self.samples, self.seed, self.start = samples, seed, start
        self.global_batch = global_batch  # samples of one forward of all ranks together
        self.mine = slice_of(global_batch, rank, world_size)
        self.step_size = global_batch * accumulate
        self.steps_per_epoch = samples // self.step_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, step = divmod(self.start, self.steps_per_epoch)
        while True:
            order = self.order(epoch)
            for begin in range(step * self.step_size, self.steps_per_epoch * self.step_size, self.global_batch):
                yield [(epoch, order[begin + place]) for place in self.mine]
            epoch, step = epoch + 1, 0

    def order(self, epoch: int) -> list[int]:
        """The samples of an epoch that are taken, in their order: with groups or without, the same ones."""
        shuffled = self.shuffle(epoch)[: self.steps_per_epoch * self.step_size]
        if self.groups is None:
            return shuffled
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, -1))
        return in_groups(shuffled, self.groups, self.global_batch, generator)

    def shuffle(self, epoch: int) -> list[int]:
        """The order of all samples in an epoch."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        return torch.randperm(self.samples, generator=generator).tolist()


def in_groups(order: Sequence[int], groups: Sequence[int], size: int, generator: torch.Generator) -> list[int]:
    """The same samples, batches of one size in an order that is drawn anew, each of one group but for the last few.

    What does not fill a batch of its group is joined, in order of group, so that fewer batches than there are groups
    are of several. len(order) is a multiple of size.

    Source: torchvision's references/detection/group_by_aspect_ratio.py.
    """
    members: dict[int, list[int]] = {group: [] for group in sorted(set(groups))}
    for sample in order:
        members[groups[sample]].append(sample)
    whole = {group: len(each) // size * size for group, each in members.items()}
    joined = [sample for group, each in members.items() for sample in each[: whole[group]]]
    joined += [sample for group, each in members.items() for sample in each[whole[group] :]]
    batches = torch.randperm(len(order) // size, generator=generator).tolist()
    return [sample for batch in batches for sample in joined[batch * size : (batch + 1) * size]]


class EvalSampler:
    """This rank's share of every sample exactly once: no padding, nothing dropped, perhaps nothing at all."""

    def __init__(self, samples: int, *, batch_per_rank: int, rank: int, world_size: int):
        self.mine = range(rank, samples, world_size)
        self.batch_per_rank = batch_per_rank
        self.most = -(-len(range(0, samples, world_size)) // batch_per_rank)  # batches that any rank has

    def __iter__(self) -> Iterator[list[Key]]:
        for begin in range(0, len(self.mine), self.batch_per_rank):
            yield [(0, index) for index in self.mine[begin : begin + self.batch_per_rank]]

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_per_rank)
