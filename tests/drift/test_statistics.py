"""Each formula against scipy, against the plain definition, or against what chance does ten thousand times."""

import math

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from syncbn.drift import statistics
from syncbn.drift.f_distribution import log_f_tail
from syncbn.drift.figures import Traits, apart, chance, figures
from syncbn.drift.statistics import Layers, Offsets, Running, Sums, add_up
from syncbn.moments import Moments

RUNS = 10_000  # each is a channel: channels do not meet
EPS = 1e-5


def shards(forwards, counts, *, size=3, between_images=1.0, of_ranks=0.0, channels=RUNS, seed=0):
    """Values [T, B, size, C] of each rank: noise, an offset of each image, and of each rank one that lasts."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, channels, generator=generator, dtype=torch.float64)

    return [
        5 + noise(forwards, count, size) + between_images * noise(forwards, count, 1) + of_ranks * noise(1, 1, 1)
        for count in counts
    ]


def moments(values):
    """Moments of [T, B, size, C]: count [T, 1], mean and m2 [T, C]."""
    flat = values.flatten(1, 2)
    count = torch.full((len(flat), 1), float(flat.size(1)), dtype=torch.float64)
    if flat.size(1) == 0:
        return Moments(count, torch.zeros_like(values[:, :0].sum((1, 2))), torch.zeros_like(values.sum((1, 2))))
    return Moments(count, flat.mean(1), flat.var(1, correction=0) * flat.size(1))


def sums_of(ranks, running=None):
    """Each rank's Sums, and all of them together."""
    whole, channels = moments(torch.cat(ranks, dim=1)), ranks[0].size(-1)
    if running is None:
        running = Running(*(torch.full_like(whole.mean, v) for v in (5.0, 2.0)))
    each = []
    for values in ranks:
        local, images = moments(values), torch.full((len(values), 1), float(values.size(1)), dtype=torch.float64)
        between = values.size(2) * (values.mean(2) - local.mean.unsqueeze(1)).square().sum(1)
        scale = torch.ones(channels, dtype=torch.float64)
        eps, of = torch.full_like(scale, EPS), torch.zeros(channels, dtype=torch.int64)
        each.append(add_up(local, whole, between, images, whole, running, scale, eps, of))
    return each, Sums(*(torch.stack(field).sum(0) for field in zip(*each, strict=True)))


@pytest.mark.parametrize("between, within", [(1, 1), (1, 30), (7, 8), (70, 80), (700, 800), (3, 1e6), (0.5, 3.2)])
def test_the_tail_of_f_is_scipys(between, within):
    f = torch.tensor([0.0, 0.01, 0.5, 1.0, 1.05, 2.0, 5.0, 20.0, 1000.0], dtype=torch.float64)

    got = log_f_tail(f, *(torch.tensor(d, dtype=torch.float64) for d in (between, within)))

    want = torch.tensor(stats.f.logsf(f.numpy(), between, within))
    finite = want.isfinite()  # scipy's underflows
    assert finite.sum() >= 6
    assert_close(got[finite], want[finite], rtol=1e-8, atol=1e-8)
    assert (got[~finite] < -700).all()


def test_the_tail_of_what_is_no_f_is_nan():
    nan, inf = math.nan, math.inf
    f, between, within = torch.tensor([[nan, inf, -1.0, 1.0, 1.0], [3, 3, 3, 0, 3], [3, 3, 3, 3, nan]]).double()
    assert log_f_tail(f, between, within).isnan().all()


SPLITS = {
    "pairs": (10, [2] * 8),
    "one-step": (1, [2] * 8),
    "two-ranks": (10, [2, 2]),
    "uneven": (10, [4, 2, 1, 3]),
    "empty-rank": (10, [3, 0, 3]),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_f_is_the_analysis_of_variance(split):
    forwards, counts = split
    ranks = shards(forwards, counts, of_ranks=1.0, channels=5)

    _, whole = sums_of(ranks)

    for channel, f in enumerate(statistics.f_ratio(whole).tolist()):
        means = [values[..., channel].mean(2) for values in ranks if values.size(1)]
        grand = torch.cat(means, 1).mean(1, keepdim=True)
        between = sum(m.size(1) * (m.mean(1, keepdim=True) - grand).square().sum() for m in means)
        within = sum((m - m.mean(1, keepdim=True)).square().sum() for m in means)
        freedom = forwards * (len(means) - 1), forwards * (sum(counts) - len(means))
        assert f == pytest.approx(float((between / freedom[0]) / (within / freedom[1])))
        assert (float(whole.rank_freedom), float(whole.image_freedom)) == pytest.approx(freedom)
        if forwards == 1:
            assert f == pytest.approx(stats.f_oneway(*(m[0].numpy() for m in means)).statistic)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_chance_crosses_the_999th_thousandth_of_f_once_in_a_thousand(split):
    _, whole = sums_of(shards(*split))

    tail = log_f_tail(statistics.f_ratio(whole), whole.rank_freedom, whole.image_freedom)

    assert 0.0005 <= float((tail < math.log(0.001)).double().mean()) <= 0.002
    assert float((tail < math.log(0.5)).double().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("counts", [[2] * 8, [1] * 8, [1, 1], [4, 2, 1, 3]], ids=str)
def test_chance_crosses_the_999th_thousandth_of_an_offset_once_in_a_thousand(counts):
    each, whole = sums_of(shards(10, counts, seed=1))

    t2 = torch.stack([statistics.offset_t(mine, whole).square() for mine in each])
    tail = log_f_tail(t2, torch.tensor(1.0), whole.rank_freedom - 1)
    assert 0.0005 <= float((tail < math.log(0.001)).double().mean()) <= 0.002
    assert ((tail < math.log(0.5)).double().mean(1) - 0.5).abs().max() < 0.03


@pytest.mark.parametrize("counts, off", [([2] * 8, 0.03), ([4, 2, 1, 3, 2, 2], 0.05)], ids=["even", "uneven"])
def test_icc_is_the_share_of_variance_between_ranks(counts, off):
    """Images vary by 1 + 1 / 3, ranks by 0.5 of it."""
    _, whole = sums_of(shards(40, counts, of_ranks=math.sqrt(0.5), channels=2000))
    icc = statistics.intraclass_correlation(whole)
    assert float(icc.mean()) == pytest.approx(0.5 / (0.5 + 1 + 1 / 3), abs=off)


@pytest.mark.parametrize("counts", [[2] * 8, [1] * 4, [4, 2, 1, 3], [5]], ids=str)
def test_n_eff_is_how_many_independent_values_have_a_mean_as_sure(counts):
    ranks = shards(20, counts, between_images=2.0, channels=500)
    _, whole = sums_of(ranks)

    n_eff = statistics.effective_size(whole)

    variance_of_mean = torch.cat(ranks, 1).mean((1, 2)).var(0).mean()
    of_values = 1 + 4  # noise and images
    assert float(n_eff.mean()) == pytest.approx(float(of_values / variance_of_mean), rel=0.05)
    # And the bias of a batch's variance
    of_batches = torch.cat(ranks, 1).flatten(1, 2).var(1, correction=0).mean()
    assert float(of_batches) / of_values == pytest.approx(1 - 1 / float(n_eff.mean()), abs=0.02)


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.9])
@pytest.mark.parametrize("forwards", [2, 10, 100])
def test_the_lag_of_batches_from_one_source_is_1(forwards, momentum):
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(round(8 / momentum) + forwards, RUNS, generator=generator, dtype=torch.float64)
    running, lags = torch.zeros(RUNS, dtype=torch.float64), []
    for batch in batches:
        lags.append(batch - running)
        running = running.lerp(batch, momentum)
    d = torch.stack(lags[-forwards:])

    z = statistics.lag_z(
        d.mean(0), d.square().mean(0), *(torch.tensor(float(v)) for v in (forwards, 1)), torch.tensor(momentum)
    )

    # Two forwards scatter so little now and then that z has no mean
    assert float(z.median()) == pytest.approx(1, abs=0.05 if forwards > 2 else 0.2)


def test_a_lag_is_what_does_not_scatter():
    mean, mean_square = torch.tensor([0.0, 3.0]), torch.tensor([1.0, 10.0])
    z = statistics.lag_z(mean, mean_square, torch.tensor(1000.0), torch.tensor(1.0), torch.tensor(0.1))
    assert_close(z, torch.tensor([1.0, 10**0.5]), rtol=1e-3, atol=0)


def test_one_forward_has_no_scatter_to_compare_its_lag_with():
    one = torch.ones(3)
    assert statistics.lag_z(one, one, torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.1)).isnan().all()


def test_kl_is_that_of_the_ranks_gaussians():
    ranks = shards(3, [4, 2, 5], of_ranks=1.0, channels=4)
    _, whole = sums_of(ranks)
    of_all, want = moments(torch.cat(ranks, 1)), 0
    for values in ranks:
        local = moments(values)
        kl = 0.5 * ((local.var + (local.mean - of_all.mean).square()) / of_all.var - 1 + (of_all.var / local.var).log())
        want = want + (local.count / of_all.count * kl).sum(0) / 3
    assert_close(whole.kl / whole.share, want, rtol=1e-4, atol=1e-5)  # eps


def test_layers_side_by_side_have_the_figures_that_they_have_alone():
    channels, each = [3, 1, 5], [sums_of(shards(4, [2, 3], of_ranks=0.3, channels=n, seed=n)) for n in (3, 1, 5)]
    together = Layers(channels)
    mine = together.unpack(together.pack([ranks[0].packed() for ranks, _ in each]))
    whole = together.unpack(together.pack([one.packed() for _, one in each]))
    by_figure = figures(whole, together, traits(3), 2, 1)
    for n, (ranks, one) in enumerate(each):
        alone = Layers([channels[n]])
        for name, value in figures(one, alone, traits(1), 2, 1).items():
            assert_close(by_figure[name][n : n + 1], value, equal_nan=True)
        for got, want in zip(
            apart(Offsets.of(mine), whole, together), apart(Offsets.of(ranks[0]), one, alone), strict=True
        ):
            assert_close(got[n : n + 1], want)
        for got, want in zip(
            chance(Offsets.of(mine), whole, together), chance(Offsets.of(ranks[0]), one, alone), strict=True
        ):
            assert_close(got[n : n + 1], want)


def traits(layers, *, synced=True, momentum=0.1):
    every = torch.ones(layers, dtype=torch.float64)
    return Traits(every.bool() & synced, every.bool(), momentum * every, EPS * every)


def test_constant_and_nearly_constant_channels_are_counted_and_are_no_evidence():
    ranks = shards(4, [2, 2, 2], channels=4)
    for rank, values in enumerate(ranks):
        values[..., 0] = 7 + 1e-9 * rank
        values[..., 1] *= 1e-4
    _, whole = sums_of(ranks)

    by_figure = figures(whole, Layers([4]), traits(1), 3, 1)

    assert by_figure["dead"].tolist() == [1]
    assert by_figure["eps_dominated"].tolist() == [2]
    each, whole = sums_of([values[..., :1] for values in ranks])
    assert chance(Offsets.of(each[2]), whole, Layers([1])).offset.tolist() == [0]
    assert chance(Offsets.of(each[2]), whole, Layers([1])).between_ranks.tolist() == [0]


def test_what_cannot_be_known_is_nan():
    """One rank of one image in one forward."""
    _, whole = sums_of(shards(1, [1], channels=2))
    by_figure = figures(whole, Layers([2]), traits(1), 1, 1)
    assert {name for name, value in by_figure.items() if value.isfinite().all()} == {
        "lag", "lag_logvar", "kl", "dead", "eps_dominated", "conditioning",
    }  # fmt: skip
