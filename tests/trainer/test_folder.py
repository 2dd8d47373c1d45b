"""A run's folder: named by its choices, never taken from another run."""

import pytest
import yaml

from syncbn.trainer.config import Config, as_dict
from syncbn.trainer.errors import UserError
from syncbn.trainer.folder import RunConfig, RunFolder, differences, name_of

CONFIG = as_dict(Config())


@pytest.mark.parametrize(
    ("experiment", "overrides", "name"),
    [
        (None, [], "digits-resnet8-sync-b4-seed0"),
        ("cifar10", ["experiment=cifar10", "data.root=/somewhere"], "cifar10-resnet8-sync-b4-seed0"),
        (
            None,
            ["seed=1", "seed=0", "norm=sync", "launch.nproc=4", "wandb.mode=disabled", "run.root=x"],
            "digits-resnet8-sync-b4-seed0",
        ),
        (None, ["train.ema=0.9", "optim.lr=0.2"], "digits-resnet8-sync-b4-optim.lr_0.2-train.ema_0.9-seed0"),
        (None, ["model.weights=a/b.pt"], "digits-resnet8-sync-b4-model.weights_a_b.pt-seed0"),
    ],
)
def test_the_name_tells_the_choices(experiment, overrides, name):
    assert name_of(CONFIG, experiment, overrides) == name


def made(root, **changes):
    folder = RunFolder(RunConfig(name="a", root=str(root)))
    folder.create({**CONFIG, **changes})
    return folder


def test_another_config_is_refused_and_the_difference_named(tmp_path):
    folder = made(tmp_path, seed=1)
    with pytest.raises(UserError, match=r"holds a run with another config \(seed 1 -> 0\): .*run.overwrite=true"):
        folder.refuse_other(CONFIG)
    assert yaml.safe_load(folder.config.read_text())["seed"] == 1


def test_the_same_config_is_the_same_run_wherever_it_is_launched(tmp_path):
    elsewhere = {"launch": {"nproc": 8, "device": "cpu"}, "wandb": {}}
    made(tmp_path, **elsewhere).refuse_other(CONFIG)  # does not raise
    assert differences({**CONFIG, **elsewhere}, CONFIG) == []


def test_overwrite_replaces_the_run_whole(tmp_path):
    folder = made(tmp_path, seed=1)
    (folder.path / "metrics.jsonl").write_text("old")
    again = RunFolder(RunConfig(name="a", root=str(tmp_path), overwrite=True))
    again.refuse_other(CONFIG)
    again.create(CONFIG)
    assert not again.metrics.exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    for overwrite in False, True:
        with pytest.raises(UserError, match=r"exists and is no run"):
            RunFolder(RunConfig(name="a", root=str(tmp_path), overwrite=overwrite)).refuse_other(CONFIG)


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".hidden"])
def test_a_name_is_one_folder(name):
    with pytest.raises(UserError, match="give one folder's name"):
        RunConfig(name=name)
