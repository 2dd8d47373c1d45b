"""What the figures amount to, in words."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Independent values of which a batch's variance is off by sqrt(2 / 12), two fifths: about four images at the last
# layers of a ResNet, where batch norm costs points (Wu & He 2018, arXiv:1803.08494, figure 1)
SMALL_BATCH = 12.0
# What was said is taken back only this far on the other side, or it would come and go
_SLACK = 1.25
# How far batches lie from the running statistics: in standard deviations, and in nats of variance, ln 2
LAG, LAG_LOGVAR = 0.5, 0.7
# The share of running statistics that is still from before the batches, of which more is a reason for a lag
OLD = 0.05
# Differences between ranks that are smaller harm nobody, however sure they are: ICC, standard deviations of an image
SMALL_ICC, SMALL_OFFSET = 0.01, 0.1
# So many ranks are listed
_MANY = 8


class Verdict(NamedTuple):
    """Something that is wrong.

    kind: "buffers diverged", "shards differ", "running statistics lag" or "batch too small", in order of weight.
    text: the kind and its evidence.
    layer: where it is worst. rank: which one stands apart, if it is one.
    """

    kind: str
    text: str
    layer: str
    rank: int | None = None


class Reading(NamedTuple):
    """What `DriftMonitor.read` found, over the last readings together; the same on every rank.

    layers: by layer, the figures that are defined: see DriftMonitor.
    rank_z: by layer, how far each rank stands apart for long, as a multiple of chance: 1 is chance.
    verdicts: what is wrong, the weightiest first; none is ok.
    """

    layers: dict[str, dict[str, float]]
    rank_z: dict[str, list[float]]
    verdicts: list[Verdict]


class Evidence(NamedTuple):
    """What is known of one layer.

    figures: over all windows; see DriftMonitor. typical: the median of windows.
    synced: whether it normalises by all ranks' batches.
    log_chance: ln of how likely chance alone is to have ranks differ so, without the window that speaks most for it,
        and corrected for all that is tested. log_chance_of_ranks: the same for each rank to stand apart.
    offsets: of each rank, in standard deviations of an image.
    momentum: of the running statistics; None: they are the mean of all batches. batches: that moved them while watched.
    """

    layer: str
    figures: Mapping[str, float]
    typical: Mapping[str, float]
    synced: bool
    log_chance: float
    log_chance_of_ranks: Sequence[float]
    offsets: Sequence[float]
    momentum: float | None
    batches: float


def buffers_diverged(buffer: str, prints: Sequence[object], layer: str) -> Verdict | None:
    """prints: of each rank's buffer, equal if and only if the buffers are; None of ranks that do not share it."""
    camps = Counter(one for one in prints if one is not None).most_common()
    if len(camps) < 2:
        return None
    # Between two camps of one size nobody can tell
    trusted = camps[0][0] if camps[0][1] > camps[1][1] else None
    off = [rank for rank, one in enumerate(prints) if one is not None and one != trusted]
    return Verdict("buffers diverged", f"buffers diverged ({layer}.{buffer} of {_listed(off)})", layer, off[0])


def shards_differ(layers: Sequence[Evidence], alpha: float) -> Verdict | None:
    """alpha: the chance of a false alarm that is taken."""
    sure = math.log(alpha)
    apart = [one for one in layers if one.log_chance < sure and one.figures.get("icc", 0) > SMALL_ICC]
    ranks = [
        (offset, rank, one)
        for one in layers
        for rank, (offset, chance) in enumerate(zip(one.offsets, one.log_chance_of_ranks, strict=True))
        if chance < sure and offset > SMALL_OFFSET
    ]
    furthest = max(ranks, key=lambda candidate: candidate[0], default=None)
    if not apart and furthest is None:
        return None
    # The two ranks of a pair stand apart from each other alike
    rank = furthest[1] if furthest and len(layers[0].offsets) > 2 else None
    if apart:
        layer = max(apart, key=lambda one: one.figures["icc"])
        evidence = f"ICC {layer.figures['icc']:.2f} at {layer.layer}"
    else:
        offset, _, layer = furthest  # pyright: ignore[reportGeneralTypeIssues]
        evidence = f"offset {offset:.1f} σ at {layer.layer}"
    named = "" if rank is None else f", rank {rank}"
    return Verdict("shards differ", f"shards differ ({evidence}{named})", layer.layer, rank)


def running_statistics_lag(layers: Sequence[Evidence], again: bool) -> Verdict | None:
    """again: whether it was said at the last reading."""

    def lag(one: Evidence) -> float:
        return max(one.typical.get("lag", 0) / LAG, one.typical.get("lag_logvar", 0) / LAG_LOGVAR)

    worst = max(layers, key=lag)
    if lag(worst) < (1 / _SLACK if again else 1):
        return None
    mean, factor = worst.typical["lag"], math.exp(worst.typical["lag_logvar"])
    evidence = f"mean by {mean:.1f} σ, variance by a factor {factor:.1f} at {worst.layer}"
    return Verdict("running statistics lag", f"running statistics lag ({evidence}){_slow(worst)}", worst.layer)


def _slow(one: Evidence) -> str:
    """Whether the momentum is too small for so few batches, and the mend."""
    if one.momentum is None or (1 - one.momentum) ** one.batches <= OLD:
        return ""
    return f": momentum {one.momentum:g} has seen {one.batches:.0f} batches; raise it, or recalibrate"


def batch_too_small(layers: Sequence[Evidence], again: bool) -> Verdict | None:
    """again: whether it was said at the last reading."""
    limit = SMALL_BATCH * (_SLACK if again else 1)
    small = [one for one in layers if one.typical.get("n_eff", limit) < limit]
    if not small:
        return None
    worst = min(small, key=lambda one: one.typical["n_eff"])
    mend = "more images a rank or more ranks" if worst.synced else "use norm=sync or a larger group"
    text = f"batch too small (n_eff {worst.typical['n_eff']:.0f} at {worst.layer}): {mend}"
    return Verdict("batch too small", text, worst.layer)


def _listed(ranks: Sequence[int]) -> str:
    some = ", ".join(map(str, ranks[:_MANY])) + (f" and {len(ranks) - _MANY} more" if len(ranks) > _MANY else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {some}"
