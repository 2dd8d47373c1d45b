"""A checkpoint evaluated by itself gives what its run had, by the config that it was trained with."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from syncbn.trainer import config, models
from syncbn.trainer.config import Config, as_dict, on_top_of, typed
from syncbn.trainer.errors import UserError
from syncbn.trainer.job import launch
from syncbn.trainer.models import ModelConfig
from syncbn.trainer.option import flat
from syncbn.trainer.rank.evaluate import evaluate
from syncbn.trainer.runs.checkpoint import parse_checkpoint, read_checkpoint, write_checkpoint
from syncbn.trainer.training.resume import load_checkpoint
from tests.ranks import run_ranks
from tests.trainer.trained import DETECTION, SEGMENTATION, ranks_world, train

CONF = Path(__file__).parents[3] / "conf"

TRAINED = {
    "average": {"train": {"ema": 0.5}},
    "no-average": {},
    "buffers-of-each-rank": {"norm": {"name": "local"}},
    "fused-bf16-channels-last": {"norm": {"fuse": True}, "train": {"precision": "bf16", "channels_last": True}},
    "another-norm": {"norm": {"name": "evonorm_s0"}, "eval": {"recalibrate": 2}, "train": {"ema": 0.5}},
    "frozen": {"norm": {"name": "frozen"}, "eval": {"recalibrate": 2}},
    "batch-renorm": {"norm": {"name": "batch_renorm"}, "eval": {"recalibrate": 2}},
    "segmentation": {**SEGMENTATION, "eval": {"recalibrate": 2}, "train": {"ema": 0.5}},
    "detection": {**DETECTION, "eval": {"recalibrate": 2}, "train": {"ema": 0.5}},
    "recalibrated": {"eval": {"recalibrate": 2}, "train": {"ema": 0.5, "accumulate": 2}},
}


def evaluated_on(rank, settings):
    """evaluate on this rank: the figures that it leaves for the launcher, or the line it is refused with."""
    root = settings.pop("root")
    settings = {**settings, "run": {"root": root, "name": "r"}}
    try:
        assert evaluate(typed(settings), ranks_world(rank)) == 0
    except UserError as error:
        return str(error)
    return json.loads((Path(root) / "r" / "result.json").read_text())["metrics"]


def own_settings(path, **on_top):
    """The settings that evaluate the checkpoint at path: its own, with others on top."""
    settings = load_checkpoint(path)[1]["config"]
    on_top = {"task": {"mode": "evaluate"}, "checkpoint": {"resume": str(path)}, **on_top}
    return {**settings, **{section: {**settings[section], **values} for section, values in on_top.items()}}


@pytest.mark.plain(*(TRAINED.keys() - {"frozen", "batch-renorm"}))
@pytest.mark.parametrize("settings", TRAINED.values(), ids=TRAINED)
def test_the_figures_are_those_of_its_run_to_the_last_bit(tmp_path, settings):
    trained = run_ranks(train, 2, tmp_path / "trained", settings)[0]
    evaluated = run_ranks(evaluated_on, 2, {**own_settings(tmp_path / "trained"), "root": str(tmp_path / "out")})[0]
    assert evaluated == trained


def test_the_weights_that_its_run_began_with_are_not_needed(tmp_path):
    weights = tmp_path / "weights.pt"
    torch.save(models.build(ModelConfig("resnet8"), 10).state_dict(), weights)
    trained = run_ranks(train, 2, tmp_path / "trained", {"model": {"weights": str(weights)}})[0]
    weights.unlink()
    settings = {**own_settings(tmp_path / "trained"), "root": str(tmp_path / "out")}
    assert run_ranks(evaluated_on, 2, settings)[0] == trained


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run on two ranks, with an average, recalibrated too, and a checkpoint at each step."""
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    run_ranks(train, 2, folder, {"train": {"ema": 0.5}, "eval": {"recalibrate": 2}, "checkpoint": {"every": 1}})
    return folder


@pytest.mark.parametrize("ranks", [1, 3])
def test_any_number_of_ranks_finds_the_same(averaged, tmp_path, ranks):
    own = load_checkpoint(averaged)[1]["figures"]
    evaluated = run_ranks(evaluated_on, ranks, {**own_settings(averaged), "root": str(tmp_path)})[0]
    assert evaluated == pytest.approx(own, rel=1e-6)  # float32 scores, of batches of another size
    assert evaluated["eval/images"] == 360


def test_without_the_average_the_weights_themselves_are_evaluated(averaged, tmp_path):
    own = load_checkpoint(averaged)[1]["figures"]
    settings = own_settings(averaged, train={"ema": 0.0})
    assert run_ranks(evaluated_on, 2, {**settings, "root": str(tmp_path)})[0]["eval/loss"] != own["eval/loss"]


def test_other_data_is_evaluated_however_few_it_has(averaged, tmp_path):
    settings = own_settings(averaged, data={"name": "fake", "fake_samples": 5}, eval={"recalibrate": 0})
    evaluated = run_ranks(evaluated_on, 2, {**settings, "root": str(tmp_path)})[0]
    assert evaluated["eval/images"] == 1


REFUSED_BY_RANKS = {
    "other-classes": ({"data": {"name": "fake", "fake_classes": 7}}, "10 classes apart and the data has 7: give data"),
    "other-model": ({"model": {"name": "resnet14"}}, "does not fit model.name=resnet14 (Missing key(s)"),
    "no-data": ({"data": {"name": "image_folder", "root": "/nowhere"}}, "data.root=/nowhere has no folder 'train'"),
}


@pytest.mark.parametrize(("on_top", "said"), REFUSED_BY_RANKS.values(), ids=REFUSED_BY_RANKS)
def test_what_does_not_fit_is_refused_by_every_rank_in_a_line(averaged, tmp_path, on_top, said):
    settings = {**own_settings(averaged, **on_top), "root": str(tmp_path)}
    for line in run_ranks(evaluated_on, 2, settings):
        assert said in line
        assert "\n" not in line
    assert not list(tmp_path.iterdir())


# What the launcher makes of a command line


def launched(*words):
    """The exit code of a command line that is refused before any rank is started."""
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=list(words), return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        return launch.in_one_line(lambda: launch.one_run(composed))


def damaged(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another_format(path):
    write_checkpoint(path, {**parse_checkpoint(read_checkpoint(path)), "format": 99})


def of_another_config(path):
    state = parse_checkpoint(read_checkpoint(path))
    write_checkpoint(path, {**state, "config": {**state["config"], "warp": {"speed": 9}}})


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


SPOILT = {
    "damaged": (damaged, "is damaged: its checksum is wrong: give another checkpoint"),
    "cut-short": (cut, "is damaged: its checksum is missing: give another checkpoint"),
    "another-format": (of_another_format, "cannot be used (it holds no checkpoint of this version): give another"),
    "another-config": (of_another_config, "is not of this version (warp: no such key"),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_a_file_that_is_no_checkpoint_of_ours_is_told_in_a_line(averaged, tmp_path, capfd, spoil, said):
    path = tmp_path / "step_000000003.pt"
    path.write_bytes(load_checkpoint(averaged)[0].read_bytes())
    spoil(path)
    assert launched("task=evaluate", f"checkpoint.resume={path}") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(path) in line
    assert said in line


NO_CHECKPOINT = {
    "none-given": ([], "task=evaluate evaluates a checkpoint: give checkpoint=FILE, or a run's folder"),
    "empty": (["checkpoint.resume="], "task=evaluate evaluates a checkpoint"),
    "nothing-there": (["checkpoint.resume=/nowhere/x.pt"], "/nowhere/x.pt cannot be read (No such file or directory)"),
    "no-run": ([f"checkpoint.resume={CONF}"], f"{CONF} holds no checkpoint: give a file"),
}


@pytest.mark.parametrize(("words", "said"), NO_CHECKPOINT.values(), ids=NO_CHECKPOINT)
def test_a_path_without_a_checkpoint_is_told_in_a_line(capfd, words, said):
    assert launched("task=evaluate", *words) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_a_folder_means_its_latest_and_a_pointer_what_it_points_to(averaged):
    checkpoints = averaged / "checkpoints"
    latest = checkpoints / "step_000000003.pt"
    (checkpoints / "best").write_text("step_000000002.pt")
    loaded = {
        path: load_checkpoint(path)[0] for path in (averaged, checkpoints, checkpoints / "latest", checkpoints / "best")
    }
    assert list(loaded.values()) == [latest, latest, latest, checkpoints / "step_000000002.pt"]


EARLIER = {
    "data": {"name": "cifar100", "eval_batch_per_rank": 32, "batch_per_rank": 8, "mean": [0.1], "std": [0.2]},
    "norm": {"name": "local"},
    "train": {"epochs": 3.0},
}
ON_TOP = {
    "nothing": ([], {}),
    "a-value-that-is-the-default": (["data.eval_batch_per_rank=256"], {"data.eval_batch_per_rank": 256}),
    "a-choice": (
        ["data=cifar10"],
        {
            "data.name": "cifar10",
            "data.mean": [0.4914, 0.4822, 0.4465],
            "data.std": [0.2470, 0.2435, 0.2616],
            "data.augment.pad": 4,
            "data.augment.flip": True,
        },
    ),
    "the-default-choice": (["norm=sync"], {"norm.name": "sync"}),
    "a-word-on-a-choice": (["norm=torch", "norm.fuse=false"], {"norm.name": "torch"}),
    "the-task": (["task=evaluate", "checkpoint.resume=x"], {"task.mode": "evaluate", "checkpoint.resume": "x"}),
}


@pytest.mark.parametrize(("words", "changed"), ON_TOP.values(), ids=ON_TOP)
def test_the_command_line_goes_on_top_of_the_earlier_config(words, changed):
    earlier = as_dict(typed(EARLIER))
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        HydraConfig.instance().set_config(compose("config", overrides=words, return_hydra_config=True))
        merged = on_top_of(earlier, words, Path("x.pt"))
    assert isinstance(merged, Config)
    assert flat(as_dict(merged)) == {**flat(earlier), **changed}


SHORT = {
    "checkpoint=runs/x": "checkpoint.resume=runs/x",
    "checkpoint={every: 5}": "checkpoint={every: 5}",
    "checkpoint.every=5": "checkpoint.every=5",
    "+checkpoint=x": "+checkpoint=x",
}


@pytest.mark.parametrize(("word", "meant"), SHORT.items(), ids=SHORT)
def test_checkpoint_is_short_for_the_path(word, meant):
    assert launch.CHECKPOINT.sub("checkpoint.resume=", word) == meant
