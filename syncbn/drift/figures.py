"""From sums to the figures that people read, layer by layer, and to how likely chance alone is."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.drift import statistics
from syncbn.drift.f_distribution import log_f_tail
from syncbn.drift.statistics import Layers, Offsets, Sums

# Of the mean, squared: what float32 takes for a constant
_CONSTANT = 1e-12


class Traits(NamedTuple):
    """What is known of layers beside their sums, [L] each.

    synced: whether a layer normalises by the whole batch that it is compared with, or by this rank's alone.
    tracks: whether it has running statistics. momentum, eps: the layer's.
    """

    synced: Tensor
    tracks: Tensor
    momentum: Tensor
    eps: Tensor


def sizes(sums: Sums, layers: Layers, traits: Traits) -> dict[str, Tensor]:
    """n_eff, lag and lag_logvar, [L] each, NaN where undefined. sums: over all ranks."""
    layer, forwards = layers.by_layer(_without(_dead(layers.by_channel(sums)), sums)), sums.forwards[layers.of]
    n_eff = statistics.effective_size(layer)

    def root_mean_square(total: Tensor) -> Tensor:
        return (layers.total((total / forwards).square()) / torch.tensor(layers.channels)).sqrt()

    return {
        "n_eff": torch.where(traits.synced, n_eff, n_eff * layer.values / layer.whole_values),
        "lag": root_mean_square(sums.shift).where(traits.tracks, torch.nan),
        "lag_logvar": root_mean_square(sums.ratio).where(traits.tracks, torch.nan),
    }


def figures(sums: Sums, layers: Layers, traits: Traits, ranks: int, windows: int) -> dict[str, Tensor]:
    """[L] each, NaN where undefined. sums: over all ranks and windows."""
    channel = layers.by_channel(sums)
    dead = _dead(channel)
    layer = layers.by_layer(_without(dead, sums))
    eps, size = traits.eps[layers.of], sizes(sums, layers, traits)
    mean, var = channel.mean / channel.forwards, channel.var / channel.forwards
    # Layers that do not synchronise are observed in a part of each window
    runs = torch.where(traits.synced, 1.0, float(windows))

    def root_mean_square(values: Tensor) -> Tensor:
        finite = values.isfinite()
        return (layers.total(torch.where(finite, values, 0.0).square()) / layers.total(finite.double())).sqrt()

    def z(total: Tensor, squares: Tensor) -> Tensor:
        in_a_row = (layer.forwards / ranks / runs)[layers.of]
        of_channel = total / channel.forwards, squares / channel.forwards
        return root_mean_square(
            statistics.lag_z(*of_channel, in_a_row, runs[layers.of], traits.momentum[layers.of])
        ).where(traits.tracks, torch.nan)

    return {
        "f": statistics.f_ratio(layer),
        "icc": statistics.intraclass_correlation(layer),
        "n_eff": size["n_eff"],
        "n_eff_synced": statistics.effective_size(layer).where(~traits.synced, torch.nan),
        "dmean_z": z(channel.shift, channel.shift2),
        "dlogvar_z": z(channel.ratio, channel.ratio2),
        "lag": size["lag"],
        "lag_logvar": size["lag_logvar"],
        "kl": layers.total(channel.kl / channel.share) / torch.tensor(layers.channels),
        "dead": layers.total(dead.double()).where(layer.forwards > 0, torch.nan),
        "eps_dominated": layers.total((var < eps).double()).where(layer.forwards > 0, torch.nan),
        "conditioning": layers.most(mean.abs() / (var + eps).sqrt()).where(layer.forwards > 0, torch.nan),
    }


class Chance(NamedTuple):
    """ln of how likely chance alone would go so far, corrected for the channels; 0 where it well might. [L] each.

    between_ranks: F, the layer's or its most extreme channel's. offset: this rank's, of the most extreme channel.
    """

    between_ranks: Tensor
    offset: Tensor


def chance(mine: Offsets, whole: Sums, layers: Layers) -> Chance:
    channel = layers.by_channel(whole)
    dead = _dead(channel)
    layer = layers.by_layer(_without(dead, whole))

    def most(evidence: Tensor) -> Tensor:
        return layers.most(torch.where(dead, 0.0, evidence.abs()))

    f = torch.stack(
        [
            statistics.f_ratio(layer),
            most(statistics.f_ratio(channel)),
            most(statistics.offset_t(layers.by_channel(mine), channel)).square(),
        ]
    )
    one = torch.ones_like(layer.rank_freedom)
    between = torch.stack([layer.rank_freedom, layer.rank_freedom, one])
    within = torch.stack([layer.image_freedom, layer.image_freedom, layer.rank_freedom - 1])
    # Two standard deviations, about: below, the tail is not worth its series
    notable = (f > 1 + 2 * (2 / between + 2 / within).sqrt()) & (between > 0) & (within > 0) & f.isfinite()
    tails = torch.zeros_like(f)
    if notable.any():
        tails[notable] = log_f_tail(f[notable], between[notable], within[notable])
    of_layer, of_channel, of_offset = tails
    corrected = torch.tensor(layers.channels).log()
    between_ranks = torch.minimum(of_layer, of_channel + corrected) + math.log(2)
    return Chance(between_ranks.clamp(max=0), (of_offset + corrected).clamp(max=0))


def apart(mine: Offsets, whole: Sums, layers: Layers) -> tuple[Tensor, Tensor]:
    """How far this rank stands apart for long, root mean square over channels: in multiples of chance, and in standard
    deviations of an image. [L] each."""
    mine, whole = layers.by_channel(mine), layers.by_channel(whole)
    channels, dead = torch.tensor(layers.channels), _dead(whole)
    measures = statistics.offset_t(mine, whole), statistics.offset_size(mine, whole)
    t, size = (torch.where(dead | ~m.isfinite(), 0.0, m).square() for m in measures)
    return (layers.total(t) / channels).sqrt(), (layers.total(size) / channels).sqrt()


def _without(dead: Tensor, sums: Sums) -> Sums:
    """sums, with nothing of the channels in which images and ranks differ by rounding alone."""
    names = "between_ranks", "between_images", "total"
    return sums._replace(**{name: getattr(sums, name).masked_fill(dead, 0.0) for name in names})


def _dead(channel: Sums) -> Tensor:
    """[C] whether a channel is constant over all batches."""
    mean = channel.mean / channel.forwards
    return channel.var / channel.forwards <= _CONSTANT * mean.square()
