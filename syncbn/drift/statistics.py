"""What the figures of drift mean: sums over forwards, figures out of sums, and how far chance alone would bring them.

Everything is per channel, in float64, and pure. Names as in docs/math.md, "Drift".
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from syncbn.moments import Moments


class Sums(NamedTuple):
    """Sums over the forwards of layers on one rank; added over ranks, those of all. C: the channels of all L layers.

    v is 1 / running_var, so that channels and steps of unlike scale weigh alike; n counts values, r is this rank. What
    is of a layer, the last eight, is [L], or, as the formulas below want it, [C] too.

    offset: [C] Σ √(v n_r) (mean_r - mean), where a rank stands apart for long.
    between_ranks: [C] Σ v n_r (mean_r - mean)².
    between_images: [C] Σ v Σ_i n_i (mean_i - mean_r)², over the images i of this rank.
    total: [C] Σ v m2, of the whole batch.
    kl: [C] Σ (n_r / n) ½ ln(var / var_r); over ranks, the mean KL of their Gaussians from the whole batch's, in nats.
    shift, shift2: [C] Σ d and Σ d², d = (mean - running_mean) / √running_var.
    ratio, ratio2: [C] Σ l and Σ l², l = ln(var / running_var).
    mean, var: [C] Σ mean and Σ var, of the whole batch.
    forwards: [L] those in which the whole batch held a value.
    share: [L] Σ n_r / n; over ranks, the forwards of all groups.
    rank_freedom: [L] Σ (1 - n_r / n), over ranks the degrees of freedom of between_ranks, Σ (ranks with values - 1).
    image_freedom: [L] Σ (images - 1), those of between_images.
    spread: [L] Σ images (1 - n_r / n); over rank_freedom, the images of a rank, as an analysis of variance counts them.
    images, values: [L] Σ images and Σ n_r. whole_values: [L] Σ n.
    """

    offset: Tensor
    between_ranks: Tensor
    between_images: Tensor
    total: Tensor
    kl: Tensor
    shift: Tensor
    shift2: Tensor
    ratio: Tensor
    ratio2: Tensor
    mean: Tensor
    var: Tensor
    forwards: Tensor
    share: Tensor
    rank_freedom: Tensor
    image_freedom: Tensor
    spread: Tensor
    images: Tensor
    values: Tensor
    whole_values: Tensor

    def packed(self) -> Tensor:
        """All of it, one after the other."""
        return torch.cat(self)


class Offsets(NamedTuple):
    """Of one rank's Sums, all that tells how far it stands apart from the others."""

    offset: Tensor
    forwards: Tensor
    rank_freedom: Tensor
    images: Tensor

    @classmethod
    def of(cls, sums: Sums) -> "Offsets":
        return cls(*(getattr(sums, name) for name in cls._fields))


_Each = TypeVar("_Each", Sums, Offsets)

LAYER = 8  # of a layer, not of a channel
CHANNEL = len(Sums._fields) - LAYER


class Layers:
    """Where among C channels those of L layers lie.

    channels: of each layer.
    of: [C] the layer of each channel. of_all, of_offsets: the layer of each number in the packed Sums, and Offsets, of
        all layers together.
    """

    def __init__(self, channels: Sequence[int]):
        self.channels = list(channels)
        self.of = torch.repeat_interleave(torch.tensor(self.channels, dtype=torch.int64))
        self.of_all = torch.cat([self.of.repeat(CHANNEL), torch.arange(len(self.channels)).repeat(LAYER)])
        layers = len(Offsets._fields) - 1
        self.of_offsets = torch.cat([self.of, torch.arange(len(self.channels)).repeat(layers)])
        lengths = [CHANNEL * n + LAYER for n in self.channels]
        places = [place.split([len(place) - LAYER, LAYER]) for place in torch.arange(sum(lengths)).split(lengths)]
        by_channel = torch.cat([place.view(CHANNEL, -1) for place, _ in places], dim=1)
        by_layer = torch.stack([place for _, place in places], dim=1)
        self._lengths, self._order = lengths, torch.cat([by_channel.flatten(), by_layer.flatten()])

    def pack(self, packed: Sequence[Tensor]) -> Tensor:
        """The packed Sums of all layers together, of those of each."""
        device = packed[0].device
        return torch.cat([t.to(device) for t in packed])[self._order.to(device)]

    def apart(self, packed: Tensor) -> list[Tensor]:
        """The packed Sums of each layer, of those of all together."""
        return list(torch.empty_like(packed).index_copy_(0, self._order.to(packed.device), packed).split(self._lengths))

    def unpack(self, packed: Tensor) -> Sums:
        """Sums of [C] and [L]."""
        by_channel, by_layer = packed.split([CHANNEL * len(self.of), LAYER * len(self.channels)])
        return Sums(*by_channel.view(CHANNEL, -1), *by_layer.view(LAYER, -1))

    def unpack_offsets(self, packed: Tensor) -> Offsets:
        """Offsets of [C] and [L]."""
        layers = len(self.channels)
        return Offsets(*packed.split([len(self.of)] + [layers] * (len(Offsets._fields) - 1)))

    def by_channel(self, sums: _Each) -> _Each:
        """Everything as [C]."""
        return sums._make(t[self.of] if len(t) == len(self.channels) else t for t in sums)

    def by_layer(self, sums: Sums) -> Sums:
        """Everything as [L], each layer as if its channels were one."""
        return Sums(*(self.total(t) for t in sums[:CHANNEL]), *sums[CHANNEL:])

    def total(self, values: Tensor) -> Tensor:
        """[L] the sums over the channels of each layer."""
        return values.new_zeros(len(self.channels)).index_add_(0, self.of, values)

    def most(self, values: Tensor) -> Tensor:
        """[L] the largest of each layer's; what is NaN counts as 0."""
        zeros = values.new_zeros(len(self.channels))
        return zeros.scatter_reduce_(0, self.of, values.nan_to_num(0, posinf=1e12), "amax")


class Running(NamedTuple):
    """The running statistics before each forward, [K, C]."""

    mean: Tensor
    var: Tensor


def unpack_moments(count: Tensor, of: Tensor, first: Tensor, second: Tensor, message: Tensor | bool) -> Moments:
    """Moments of K packed ones: count [K, L], mean and m2 [K, C]. message: which are so packed, the others are rows."""
    mean = first / count[:, of].clamp(min=1)
    if message is True:
        return Moments(count, mean, (second - first * mean).clamp(min=0))
    if message is False:
        return Moments(count, first, second)
    m2 = (second - first * mean).clamp(min=0)
    return Moments(count, torch.where(message, mean, first), torch.where(message, m2, second))


def add_up(
    local: Moments,
    whole: Moments,
    between_images: Tensor,
    images: Tensor,
    tracked: Moments,
    running: Running,
    scale: Tensor,
    eps: Tensor,
    of: Tensor,
) -> Sums:
    """The Sums of K forwards.

    Args:
        local, whole: Moments of this rank and of all that it is compared with, count [K, L], mean and m2 [K, C].
        between_images: [K, C], and images, [K, L]: as in kernels.Local.
        tracked: the moments that the running statistics follow: whole's, or where nothing is synchronised local's.
        running: what they were before.
        scale: v, [K, C] or [C]; the same on every rank.
        eps: [C] the layers', which keeps constants from being divided by 0.
        of: [C] the layer of each channel.
    """
    share = local.count / whole.count.clamp(min=1)
    here, seen = (local.count > 0).double(), (whole.count > 0).double()
    freedom = here - share
    count, has_moments, apart = local.count[:, of], tracked.count[:, of] > 0, local.mean - whole.mean
    # Of an empty rank or batch m2 is 0, and so is its variance
    var, local_var = (m.m2 / m.count[:, of].clamp(min=1) for m in (whole, local))
    unbiased = tracked.m2 / (tracked.count[:, of] - 1).clamp(min=1)
    shift = has_moments * (tracked.mean - running.mean) / (running.var + eps).sqrt()
    ratio = has_moments * ((unbiased + eps) / (running.var + eps)).log()
    terms = (
        (scale * count).sqrt() * apart,
        scale * count * apart.square(),
        scale * between_images,
        scale * whole.m2,
        share[:, of] * 0.5 * ((var + eps) / (local_var + eps)).log(),
        shift,
        shift.square(),
        ratio,
        ratio.square(),
        seen[:, of] * whole.mean,
        var,
        seen,
        share,
        freedom,
        (images - 1).clamp(min=0),
        images * freedom,
        images,
        local.count,
        whole.count,
    )
    return Sums(*(term.sum(0) for term in terms))


def f_ratio(sums: Sums) -> Tensor:
    """[C] F = MSB / MSI, the mean squares between ranks and between the images of a rank; 1 if ranks differ by chance.

    Under chance it follows F(rank_freedom, image_freedom): of T forwards, W ranks and B images a rank,
    F(T (W - 1), T W (B - 1)). NaN where no rank has two images.

    Source: Fisher 1925, the analysis of variance in one way.
    """
    return (sums.between_ranks / sums.rank_freedom) / (sums.between_images / sums.image_freedom)


def intraclass_correlation(sums: Sums) -> Tensor:
    """[C] ICC = (F - 1) / (F - 1 + B): the share of the variance between images that lies between ranks; 0 by chance.

    Source: Fisher 1925; for ranks of unlike size B is as in Donner 1986, "A review of inference procedures for the
    intraclass correlation coefficient in the one-way random effects model".
    """
    above = f_ratio(sums) - 1
    return above / (above + sums.spread / sums.rank_freedom)


def effective_size(sums: Sums) -> Tensor:
    """[C] n_eff, the number of independent values that the whole batch is worth: var(mean) = σ² / n_eff.

    With the design effect D = (mean square between images) / σ² it is n / D; as a batch's variance is on average
    σ² (1 - 1 / n_eff), that is 1 + m2 / (mean square between images).

    Source: Kish 1965, "Survey Sampling", section 8.2.
    """
    mean_square = (sums.between_ranks + sums.between_images) / (sums.rank_freedom + sums.image_freedom)
    return 1 + sums.total / sums.forwards / mean_square


def offset_t(mine: Sums | Offsets, whole: Sums) -> Tensor:
    """[C] how far this rank stands apart from the others for long, as a Student t of rank_freedom - 1 degrees.

    By chance the offsets of all ranks and forwards are a vector of rank_freedom normal numbers, of which mine.offset is
    a projection: r² = offset² / (mine.rank_freedom · between_ranks) follows Beta(1/2, (rank_freedom - 1) / 2). It asks
    for no images: of one a rank it works as well.
    """
    r2 = mine.offset.square() / (mine.rank_freedom * whole.between_ranks)
    # One forward of two ranks has r² = 1 always
    r2 = r2.clamp(max=1)
    return mine.offset.sign() * (r2 * (whole.rank_freedom - 1).clamp(min=0) / (1 - r2)).sqrt()


def offset_size(mine: Sums | Offsets, whole: Sums) -> Tensor:
    """[C] mean_r - mean over all forwards, in standard deviations of an image's mean; of a rank's, if none is seen."""
    mean_square = (whole.between_ranks + whole.between_images) / (whole.rank_freedom + whole.image_freedom)
    return mine.offset / mine.forwards / (mean_square * (mine.images / mine.forwards).clamp(min=1)).sqrt()


def lag_z(mean: Tensor, mean_square: Tensor, forwards: Tensor, runs: Tensor, momentum: Tensor) -> Tensor:
    """[C] how far batches lie from the running statistics, as a multiple of chance: 1 if all come from one source.

    Then d = m_t - µ_(t-1), with µ the exponential average of the m before, has the variance 2 s² / (2 - momentum),
    where s² is that of m. It is taken from the scatter of d about its mean over T forwards in a row, which itself,
    (µ_T - µ_0) / (momentum T), has the variance 2 s² (1 - (1 - momentum)^T) / (momentum (2 - momentum) T²). A lag is
    what does not scatter. NaN for T = 1.

    Args:
        mean, mean_square: [C] of d over all the forwards.
        forwards: T, in a row; runs: how many such rows there are; momentum: of the running statistics. [C] or [] each.
    """
    of_one = 2 / (2 - momentum)
    of_mean = of_one * (1 - (1 - momentum) ** forwards) / (momentum * forwards.square()) / runs
    scatter = (mean_square - mean.square()).clamp(min=0) / (of_one - of_mean)
    return torch.where(forwards > 1, (mean_square / (of_one * scatter)).sqrt(), torch.nan)
