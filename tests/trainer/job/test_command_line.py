"""The command line as people type it: what is meant is understood, or told with the words to type instead."""

import re
import shlex
from pathlib import Path

import pytest

from syncbn.trainer.errors import UserError
from syncbn.trainer.job import command_line

CONF = Path(__file__).parents[3]

TAKEN = {
    "nothing": ([], []),
    "a key": (["optim.lr=0.1"], ["optim.lr=0.1"]),
    "a group": (["data=cifar10", "norm=sync", "experiment=cifar10"],) * 2,
    "added": (["+experiment=cifar10", "++optim.lr=1"],) * 2,
    "a list": (["data.mean=[0.5,0.5,0.5]", "wandb.tags=[a, b]"],) * 2,
    "a mapping": (["norm.group={samples: 16}"],) * 2,
    "quoted": (['data.root="/p,q"', "run.name='a b'"],) * 2,
    "spaces": (["run.name=a b"],) * 2,
    "empty": (["run.name="],) * 2,
    "a sweep": (["-m", "norm=local,sync", "optim.lr=0.1,0.2"],) * 2,
    "of hydra": (["hydra.sweeper.n_trials=3", "hydra/launcher=joblib", "~hydra.callbacks"],) * 2,
    "options": (["--cfg", "job", "--config-dir=elsewhere", "-cn", "config", "--help"],) * 2,
}


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(CONF / "train.py")])


@pytest.mark.parametrize(("typed", "taken"), TAKEN.values(), ids=TAKEN)
def test_what_hydra_takes_is_left_as_it_is(typed, taken):
    assert command_line.understood(typed) == taken


@pytest.mark.parametrize("sign", ["", "+", "++"])
@pytest.mark.parametrize(
    "word", ["model.options.width=8", "model.options={width: 8}", "optim.lr_factors.head.conv=10", "model.options={}"]
)
def test_names_in_a_mapping_are_ones_own_to_choose(word, sign):
    """Hydra takes them behind ++ alone."""
    assert command_line.understood([sign + word]) == ["++" + word]
    assert command_line.understood(["-m", sign + word + ",3"]) == ["-m", "++" + word + ",3"]


def test_a_path_in_the_home_is_put_there(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert command_line.understood(["data.root=~/flowers"]) == ["data.root=/home/me/flowers"]
    monkeypatch.setenv("HOME", "/home/my self, élan")
    assert command_line.understood(["+data.root=~/a"]) == ['+data.root="/home/my self, élan/a"']
    monkeypatch.setenv("HOME", "/me")
    assert command_line.understood(["-m", "data.root=~/a,~/b"]) == ["-m", "data.root=/me/a,/me/b"]


def test_groups_of_a_folder_of_ones_own_are_known(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "one.yaml").touch()
    typed = ["--config-dir", str(tmp_path), "+bench=one"]
    assert command_line.understood(typed) == typed
    with pytest.raises(UserError, match="bench: no such key"):
        command_line.understood(["+bench=one"])


REFUSED = {
    "data.root=/p,q": "several values are a sweep, a run of each: python train.py -m data.root=/p,q; for one value",
    "data.root=/a=b": "data.root: /a=b has characters that must be quoted, twice: 'data.root=\"/a=b\"'",
    "data.root=/花": "data.root: /花 has characters that must be quoted, twice: 'data.root=\"/花\"'",
    "data.root=/a&b": "must be quoted, twice: 'data.root=\"/a&b\"'",
    "run.name=it's": "must be quoted, twice",
    "run.name=a(b)": "must be quoted, twice: 'run.name=\"a(b)\"'",
    "run.name=a{b}": "must be quoted, twice: 'run.name=\"a{b}\"'",
    'run.name=a"b"c': "must be quoted, twice",
    "modle.name=x": "modle.name: no such key; did you mean model.name?",
    "lr=0.1": "lr: no such key; did you mean optim.lr?",
    "optimizer.lr=0.1": "optimizer.lr: no such key; did you mean optim.lr?",
    "epochs=3": "epochs: no such key; did you mean train.epochs?",
    "batch_size=3": "batch_size: no such key",
    "data.batch=3": "data.batch: no such key; did you mean data.batch_per_rank?",
    "+new.key=1": "new.key: no such key; there are run, seed",
    "norm=local,sync": "norm=local,sync: several values are a sweep, a run of each: python train.py -m norm=local,sync",
    "wandb.tags=a,b": "wandb.tags is a list: 'wandb.tags=[a,b]'",
    "~train.epochs": "every key is needed, so none is taken away; train.epochs=VALUE sets it",
    "train.epochs": "train.epochs: give it a value, train.epochs=VALUE",
    "epochs": "epochs: no such key; did you mean train.epochs?",
    "train=5": "train=5: train is a section of keys: train.epochs=VALUE, say",
    "model=resnet20": "model is a section of keys: model.name=resnet20",
    "norm.group.samples=16": "norm.group is one key, whose value is a mapping: 'norm.group={samples: 16}'",
    "=5": "=5: give KEY=VALUE",
    'data.root="x': "a bracket or quote is opened in it and not closed",
    "--epochs 5": "--epochs: keys are given without dashes: train.epochs=5",
    "--lr=0.1": "--lr=0.1: keys are given without dashes: optim.lr=0.1",
    "--data.workers 2": "keys are given without dashes: data.workers=2",
    "--frobnicate": "keys are given without dashes: KEY=VALUE (python train.py --help",
    "norm.group={samples: 16}": "the shell has split this at a space; quote the whole: 'norm.group={samples: 16}'",
    "data.mean=[0.5, 0.5, 0.5]": "quote the whole: 'data.mean=[0.5, 0.5, 0.5]'",
}


@pytest.mark.parametrize(("typed", "said"), REFUSED.items(), ids=REFUSED)
def test_what_means_nothing_is_refused_with_what_was_meant(typed, said):
    """As a shell splits it, but for quotes."""
    with pytest.raises(UserError) as raised:
        command_line.understood(typed.split(" "))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


QUOTED = [typed for typed, said in REFUSED.items() if re.search("quote|is a list|mapping", said)]


@pytest.mark.parametrize("typed", QUOTED)
def test_the_quoting_that_is_shown_works(typed):
    with pytest.raises(UserError) as raised:
        command_line.understood(typed.split(" "))
    shown = re.findall(r"(?:: )('.*'|\S+)$", str(raised.value))
    if not shown:
        pytest.skip("nothing is shown")
    (word,) = shlex.split(shown[0])
    assert command_line.understood([word]) == [word]
