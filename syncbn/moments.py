"""Count, mean and second central moment of each channel: how they travel, add up and enter the running buffers."""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """What batch norm must know of a batch, per channel; float64, so that merging loses nothing.

    count: [] number of values in each channel (0 for an empty batch).
    mean: [C] their mean (0 if empty).
    m2: [C] the sum of their squared distances from the mean.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """[C] biased variance m2 / count; 0 if empty."""
        return self.m2 / self.count.clamp(min=1)

    @property
    def unbiased_var(self) -> Tensor:
        """[C] m2 / (count - 1); 0 for fewer than two values."""
        return self.m2 / (self.count - 1).clamp(min=1)


def to_message(moments: Moments) -> Tensor:
    """Pack moments as [sum x | sum x² | count], [2C + 1] float64: adding two messages merges their moments exactly."""
    count, mean, m2 = moments
    total = count * mean
    return torch.cat([total, torch.addcmul(m2, total, mean), count.unsqueeze(0)])


def from_message(message: Tensor) -> Moments:
    """Unpack a message, or the sum of many."""
    count = message[-1]
    total, squares = message[:-1].chunk(2)
    mean = total / count.clamp(min=1)
    return Moments(count, mean, torch.addcmul(squares, total, mean, value=-1).clamp(min=0))


def to_row(moments: Moments) -> Tensor:
    """Pack moments as they are, [mean | m2 | count], [2C + 1] float64, for `merge`."""
    return torch.cat([moments.mean, moments.m2, moments.count.unsqueeze(0)])


def from_row(row: Tensor) -> Moments:
    """Unpack a row."""
    mean, m2 = row[:-1].chunk(2)
    return Moments(row[-1], mean, m2)


def merge(rows: Tensor) -> Moments:
    """The moments of all rows, [W, 2C + 1], taken together; nothing cancels, however far mean is from zero.

    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    counts, (means, m2s) = rows[:, -1:], rows[:, :-1].chunk(2, dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count.clamp(min=1)
    return Moments(count, mean, (m2s + counts * (means - mean).square()).sum(0))


def unpack(shared: Tensor) -> Moments:
    """The moments in a sum of messages, [2C + 1], or in rows, [W, 2C + 1]."""
    if shared.dim() == 1:
        return from_message(shared)
    return from_row(shared[0]) if len(shared) == 1 else merge(shared)


@torch.no_grad()
def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    moments: Moments,
    momentum: float | None,
) -> None:
    """Move the running buffers towards moments, in place; an empty batch leaves them as they were.

    The count stays on the device: no host wait. momentum None is the cumulative average.
    """
    seen = moments.count > 0
    num_batches_tracked.add_(seen)
    rate = 1 / num_batches_tracked.double().clamp(min=1) if momentum is None else momentum
    step = (seen.double() * rate).to(running_mean.dtype)
    running_mean.lerp_(moments.mean.to(running_mean.dtype), step)
    running_var.lerp_(moments.unbiased_var.to(running_var.dtype), step)
