"""Drift in the trainer: what a run writes down, shows and survives."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import syncbn
from syncbn import Reading, Verdict
from syncbn.trainer import norms
from syncbn.trainer.config import typed
from syncbn.trainer.data import Batch
from syncbn.trainer.errors import UserError
from syncbn.trainer.models.residual import SmallResNet
from syncbn.trainer.norms import NormConfig, Place
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.runs.record import Record
from syncbn.trainer.training import drift, loop
from tests.ranks import run_ranks
from tests.trainer.on_ranks import Log, world_of


class Readings(Log):
    """An observer that remembers what was read."""

    def __init__(self):
        super().__init__()
        self.readings = []

    def log(self, step, figures, reading=None):
        super().log(step, figures)
        if reading:
            self.readings.append((step, reading))


def train(rank, overrides):
    """What was read and logged, and the weights in the end."""
    config = typed({"model": {"name": "resnet8"}, **overrides})
    world, log = world_of(rank), Readings()
    parts = build(config, world)
    training = assemble(parts, config, world)
    training.drift, training.recalibrate = drift.monitor(parts.model, config.drift), config.eval.recalibrate
    figures = loop.fit(training, config.train, world, log, log, drift_every=config.drift.every)
    return log.readings, log.lines, training.model.module.state_dict(), figures


STEPS = {"train": {"steps": 40, "log_every": 10}}


@pytest.mark.parametrize("every, steps", [(1, [10, 20, 30, 40]), (15, [20, 25, 30, 40]), (100, [25, 40])], ids=str)
def test_drift_is_read_so_many_steps_apart_and_before_each_eval(every, steps):
    train_options = {**STEPS["train"], "eval_every": 40 if every == 1 else 25}
    readings, _, _, _ = run_ranks(train, 2, {"train": train_options, "drift": {"every": every}})[0]
    assert [step for step, _ in readings] == steps
    assert list(readings[-1][1].layers) == [
        "bn1", *(f"blocks.{b}.bn{n}" for b in range(3) for n in (1, 2))
    ]  # fmt: skip
    assert all("icc" in figures for figures in readings[-1][1].layers.values())


@pytest.mark.plain("sync-image", "local-rank")
@pytest.mark.parametrize("level", ["rank", "image"])
@pytest.mark.parametrize("norm", ["sync", "local"])
def test_measuring_changes_no_bit_of_what_is_learnt(norm, level):
    _, lines, want, _ = run_ranks(train, 2, {**STEPS, "norm": {"name": norm}, "drift": {"level": "off"}})[0]
    assert not [name for _, figures in lines for name in figures if name.startswith("drift/")]
    _, _, got, _ = run_ranks(train, 2, {**STEPS, "norm": {"name": norm}, "drift": {"level": level}})[0]
    assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("extra", [{}, pytest.param({"ema": 0.9}, marks=pytest.mark.slow)], ids=["plain", "ema"])
def test_recalibrating_shows_what_running_statistics_miss_and_changes_nothing(extra):
    settings = {"train": {**STEPS["train"], **extra}}
    _, _, want, plain = run_ranks(train, 2, settings)[0]
    _, lines, got, figures = run_ranks(train, 2, {**settings, "eval": {"recalibrate": 8}})[0]
    assert_close(got, want, rtol=0, atol=0)
    assert plain["eval/accuracy"] == figures["eval/accuracy"]
    assert figures["eval/recalibrated_accuracy"] != figures["eval/accuracy"]
    assert "eval/recalibrated_images" not in figures
    gaps = {name: value for name, value in lines[-1][1].items() if name.endswith("/gap")}
    assert len(gaps) == 7
    assert all(0 < gap < 5 for gap in gaps.values())


def test_the_gap_is_the_divergence_of_running_statistics_from_the_population():
    model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(2)))
    x = 3 + 2 * torch.randn(64, 2, 4, 4)

    exact, gaps = drift.recalibrated(model, [Batch(x, x)], nullcontext())

    flat = x.transpose(0, 1).flatten(1).double()
    own, true = (
        torch.distributions.Normal(torch.zeros(2).double(), (1 + 1e-5) ** 0.5 * torch.ones(2).double()),
        torch.distributions.Normal(flat.mean(1), (flat.var(1) + 1e-5).sqrt()),
    )
    assert gaps == pytest.approx({"drift/0/gap": float(torch.distributions.kl_divergence(own, true).mean())})
    assert_close(exact[0].running_mean, flat.mean(1).float())
    assert model[0].running_mean.tolist() == [0, 0]


def test_a_model_without_batch_norm_trains_on_and_says_so(caplog):
    assert drift.monitor(nn.Linear(2, 2), drift.DriftConfig()) is None
    assert "the model has no batch norm layer that takes statistics: there is no drift to measure" in caplog.text


@pytest.mark.parametrize("word", ["group", "frozen"])
def test_a_norm_that_takes_no_statistics_of_a_batch_is_no_reason_to_warn(word, caplog):
    model, _ = norms.convert(SmallResNet(8, 10), NormConfig(word), Place(torch.device("cpu")))
    assert drift.monitor(model, drift.DriftConfig(), expected=norms.NORMS[word].running and word != "frozen") is None
    assert not caplog.text


@pytest.mark.parametrize("word", ["group", "frozen", "none"])
def test_without_statistics_that_move_there_is_nothing_to_recalibrate(word):
    model, _ = norms.convert(SmallResNet(8, 10), NormConfig(word), Place(torch.device("cpu")))
    assert drift.recalibrated(model.eval(), [], nullcontext()) is None


def test_recalibrating_leaves_frozen_layers_as_they_are():
    frozen, _ = norms.convert(nn.Sequential(nn.BatchNorm2d(2)), NormConfig("frozen"), Place(torch.device("cpu")))
    model = nn.Sequential(frozen, nn.BatchNorm2d(2))
    x = 3 + torch.randn(8, 2, 4, 4)
    exact, gaps = drift.recalibrated(model.eval(), [Batch(x, x)], nullcontext())
    assert list(gaps) == ["drift/1/gap"]
    assert_close(exact[0][0].state_dict(), frozen[0].state_dict())
    assert_close(exact[1].running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)  # the frozen layer's eps


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"level": "pixel"}, "drift.level=pixel: choose one of image, rank, off"),
        ({"alpha": 2.0}, "drift.alpha=2.0: give a probability"),
        ({"every": 0}, "drift.every=0: give 1"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        drift.DriftConfig(**settings)


def reading(*verdicts, **layers):
    return Reading(layers, {name: [1.0] for name in layers}, list(verdicts))


SHARDS = Verdict("shards differ", "shards differ (ICC 0.21 at bn2, rank 3)", "bn2", 3)
SMALL = Verdict("batch too small", "batch too small (n_eff 6 at bn1): more", "bn1")


def test_the_story_of_a_run_has_each_kind_once_in_order_of_weight():
    story = drift.Story()
    assert story.verdicts == []
    assert story.add(10, reading(SMALL)) == [SMALL]
    later = SHARDS._replace(text="shards differ (ICC 0.3 at bn2, rank 3)")
    assert story.add(20, reading(SHARDS, SMALL)) == [SHARDS]
    assert story.add(30, reading(later)) == []
    assert story.verdicts == [
        {**later._asdict(), "first_step": 20, "last_step": 30},
        {**SMALL._asdict(), "first_step": 10, "last_step": 20},
    ]


def test_the_worst_layers_are_those_that_differ_most_then_those_worth_least():
    story = drift.Story()
    assert story.worst_layers() == {}
    story.add(
        1, reading(a={"icc": 0.01, "n_eff": 50.0}, b={"icc": -0.2, "n_eff": 20.0}, c={"icc": 0.4, "kl": 0.1}, d={})
    )
    assert list(story.worst_layers()) == ["c", "b", "a"]
    assert story.worst_layers(1) == {"c": {"icc": 0.4, "kl": 0.1}}


def test_a_full_disk_costs_no_figure_and_no_training(tmp_path, caplog):
    record = Record(Path("/dev/full"))
    with caplog.at_level(logging.WARNING):
        record.log(1, {"loss": 1.0})
        record.log(2, {"loss": 0.5})
    assert caplog.text.count("metrics.jsonl cannot be written") == 1
    # There is room again
    record.file.close()
    record.file = (tmp_path / "metrics.jsonl").open("wb", buffering=0)
    record.log(3, {"loss": 0.25})
    record.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_figures_that_never_found_room_are_told_at_the_end():
    record = Record(Path("/dev/full"))
    record.log(1, {"loss": 1.0})
    with pytest.raises(OSError, match="No space"):
        record.close()
    assert record.file.closed
