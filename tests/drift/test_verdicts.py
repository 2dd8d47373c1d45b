"""Verdicts from figures alone: thresholds, what was said before, and who is named."""

import pytest

from syncbn.drift import verdicts
from syncbn.drift.verdicts import Evidence

SURE, UNSURE = -50.0, -1.0
RANK_1 = (UNSURE, SURE, UNSURE, UNSURE)


def evidence(
    layer="bn", *, typical=(), icc=0.0, chance=UNSURE, of_ranks=(UNSURE,) * 4, offsets=(0.0,) * 4, synced=True,
    momentum=0.1, batches=1000.0,
):  # fmt: skip
    return Evidence(layer, {"icc": icc}, dict(typical), synced, chance, of_ranks, offsets, momentum, batches)


@pytest.mark.parametrize(
    "n_eff, again, said", [(11.9, False, True), (12.1, False, False), (12.1, True, True), (15.1, True, False)]
)
def test_a_small_batch_is_not_said_and_taken_back_by_turns(n_eff, again, said):
    verdict = verdicts.batch_too_small([evidence(typical={"n_eff": n_eff})], again)
    assert (verdict is not None) == said


@pytest.mark.parametrize(
    "lag, again, said", [(0.6, False, True), (0.45, False, False), (0.45, True, True), (0.3, True, False)]
)
def test_so_is_a_lag(lag, again, said):
    verdict = verdicts.running_statistics_lag([evidence(typical={"lag": lag, "lag_logvar": 0.1})], again)
    assert (verdict is not None) == said


@pytest.mark.parametrize(
    "momentum, batches, why",
    [
        (0.01, 200.0, ": momentum 0.01 has seen 200 batches; raise it, or recalibrate"),
        (0.01, 298.0, ": momentum 0.01 has seen 298 batches; raise it, or recalibrate"),  # 0.99^298 = 5.003 %
        (0.01, 299.0, ""),
        (0.1, 200.0, ""),
        (0.0, 1e6, ": momentum 0 has seen 1000000 batches; raise it, or recalibrate"),
        (None, 200.0, ""),  # the mean of all batches
    ],
)
def test_where_momentum_is_the_reason_for_a_lag_it_is_named(momentum, batches, why):
    lag = evidence(typical={"lag": 0.9, "lag_logvar": 1.1}, momentum=momentum, batches=batches)
    text = f"running statistics lag (mean by 0.9 σ, variance by a factor 3.0 at bn){why}"
    assert verdicts.running_statistics_lag([lag], False).text == text


def test_the_layer_that_is_worst_is_named_and_the_mend_is_its_own():
    layers = [evidence("a", typical={"n_eff": 8.0}), evidence("b", typical={"n_eff": 5.0}, synced=False), evidence("c")]
    verdict = verdicts.batch_too_small(layers, False)
    assert verdict.text == "batch too small (n_eff 5 at b): use norm=sync or a larger group"
    verdict = verdicts.batch_too_small(layers[:1], False)
    assert verdict.text == "batch too small (n_eff 8 at a): more images a rank or more ranks"


@pytest.mark.parametrize(
    "given, text",
    [
        ({}, None),
        ({"chance": SURE, "icc": 0.2}, "shards differ (ICC 0.20 at bn)"),
        ({"chance": SURE, "icc": 0.005}, None),
        ({"of_ranks": RANK_1, "offsets": (2, 0.7, 0, 0)}, "shards differ (offset 0.7 σ at bn, rank 1)"),
        ({"of_ranks": RANK_1, "offsets": (2, 0.05, 0, 0)}, None),
        ({"chance": SURE, "icc": 0.2, "of_ranks": (SURE, SURE, UNSURE, UNSURE), "offsets": (0.5, 0.7, 0, 0)},
         "shards differ (ICC 0.20 at bn, rank 1)"),
        ({"of_ranks": (SURE, SURE), "offsets": (0.7, 0.7)}, "shards differ (offset 0.7 σ at bn)"),
    ],
)  # fmt: skip
def test_shards_differ_if_it_is_sure_and_matters(given, text):
    verdict = verdicts.shards_differ([evidence(**given)], 0.001)
    assert (verdict and verdict.text) == text


@pytest.mark.parametrize(
    "prints, who",
    [
        ([7, 7, 7], None),
        ([7, 8, 7], "rank 1"),
        ([7, 8, 9, 7], "ranks 1, 2"),
        ([7, 8], "ranks 0, 1"),
        ([None, 8, None, 9, 9], "rank 1"),
        ([0] * 20 + list(range(1, 11)), "ranks 20, 21, 22, 23, 24, 25, 26, 27 and 2 more"),
    ],
)
def test_buffers_of_the_fewer_ranks_have_diverged(prints, who):
    verdict = verdicts.buffers_diverged("running_var", prints, "bn")
    assert (verdict and verdict.text) == (who and f"buffers diverged (bn.running_var of {who})")
