"""A run's folder: named by its choices, never taken from another run."""

import string
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from syncbn.trainer.config import Config, as_dict
from syncbn.trainer.errors import UserError
from syncbn.trainer.runs.folder import RunFolder, differences, legal, name_of
from syncbn.trainer.runs.options import RunConfig

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
        (None, ["model.weights=w?token=s3cret"], "digits-resnet8-sync-b4-model.weights_w?token=***-seed0"),
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
    (tmp_path / "a" / "mine.txt").touch()
    for overwrite in False, True:
        with pytest.raises(UserError, match=r"exists and is no run"):
            RunFolder(RunConfig(name="a", root=str(tmp_path), overwrite=overwrite)).refuse_other(CONFIG)


def test_a_config_on_disk_holds_no_secret_and_is_still_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    config = {**CONFIG, "model": {"weights": "https://me:hunter2@host/w?n=0123456789abcdef"}}
    folder = made(tmp_path, **config)
    assert yaml.safe_load(folder.config.read_text())["model"]["weights"] == "https://me:***@host/w?n=***"
    folder.refuse_other(config)  # does not raise
    with pytest.raises(UserError, match=r"model\.weights") as raised:
        folder.refuse_other({**config, "model": {"weights": "https://me:hunter2@other/"}})
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("aim", ["elsewhere", "nowhere", "runs/other"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_out_of_the_runs_is_refused(tmp_path, aim, overwrite):
    for inside in "elsewhere", "runs/other":
        RunFolder(RunConfig(name=inside.split("/")[-1], root=str((tmp_path / inside).parent))).create(CONFIG)
    (tmp_path / "runs" / "a").symlink_to(tmp_path / aim)
    folder = RunFolder(RunConfig(name="a", root=str(tmp_path / "runs"), overwrite=overwrite))
    for attempt in folder.refuse_other, folder.create:
        with pytest.raises(UserError, match=rf"a is a link to .*{aim}: choose another run.name="):
            attempt(CONFIG)
    assert (tmp_path / "elsewhere" / "config.yaml").is_file()


def test_the_folder_of_all_runs_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    made(tmp_path / "runs").refuse_other(CONFIG)  # does not raise
    assert (tmp_path / "disk" / "a" / "config.yaml").is_file()


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "a\x1b[31mb", "\u202egnp", "é" * 101, "a" * 201, "\ud800"])
def test_a_name_that_no_folder_should_have_is_refused_in_one_line(name):
    with pytest.raises(UserError, match="give a name of at most 200 bytes without control characters") as raised:
        RunConfig(name=name)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) <= 1000


names = st.text() | st.sampled_from(["..", ".", "a" * 10_000, "é" * 150, "/../../etc", "\n", "~", "C:\\x"])


@given(names, names, st.dictionaries(names, names, max_size=3))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_a_made_name_is_one_folder_whatever_was_chosen(experiment, model, overrides):
    config = {**CONFIG, "model": {"name": model}}
    name = name_of(config, experiment, [f"{key}={value}" for key, value in overrides.items()])
    with tempfile.TemporaryDirectory() as root:
        folder = RunFolder(RunConfig(name=name, root=root))  # does not raise
        folder.path.mkdir()
        assert [each.name for each in Path(root).iterdir()] == [name]


@given(st.text(string.printable, max_size=9), st.text(string.printable, max_size=9))
@settings(derandomize=True, deadline=None)
def test_long_names_of_two_runs_differ(one, other):
    assume(one.replace("/", "_") != other.replace("/", "_"))
    assert legal("x" * 200 + one) != legal("x" * 200 + other)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "..", ".hidden"])
def test_a_name_is_one_folder(name):
    with pytest.raises(UserError, match="give one folder's name"):
        RunConfig(name=name)


def test_what_was_half_written_goes_and_the_rest_stays(tmp_path):
    folder = RunFolder(RunConfig(name="r", root=str(tmp_path)))
    folder.create(CONFIG)
    kept = {folder.checkpoints / "step_000000004.pt", folder.metrics, folder.path / "mine.txt"}
    torn = {folder.checkpoints / "step_000000007.pt.tmp", folder.checkpoints / "latest.tmp", folder.path / "a.json.tmp"}
    for path in kept | torn:
        path.touch()
    folder.go_on()
    assert kept <= set(folder.path.rglob("*"))
    assert not torn & set(folder.path.rglob("*"))
