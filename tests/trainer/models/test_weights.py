"""Trained weights from files of every make: what is loaded of them is told, and what does not fit is refused."""

import pytest
import torch
from torch import nn

from syncbn.trainer import models
from syncbn.trainer.errors import UserError
from syncbn.trainer.models import ModelConfig

trained = models.build(ModelConfig("resnet8"), 100)
STATE = trained.state_dict()
ALL = len(STATE)
FC = ["fc.weight", "fc.bias"]


def prefixed(prefix, state=STATE):
    return {prefix + key: value for key, value in state.items()}


def loaded(tmp_path, held, classes=100):
    """A model with weights of a file that holds that, and what was said of them."""
    path = tmp_path / "weights.pt"
    torch.save(held, path)
    said = []
    model = models.build(ModelConfig("resnet8", weights=str(path)), classes, said.append)
    return model.state_dict(), "; ".join(said).replace(str(path), "FILE")


WRAPPED = {
    "plain": STATE,
    "of-ddp": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "all-but-one-prefixed": {**prefixed("net.backbone."), "fc.bias": STATE["fc.bias"]},
    "state-dict": {"epoch": 3, "state_dict": prefixed("module.")},
    "model": {"model": STATE, "optimizer": {"lr": 0.1}},
    "lightning": {"state_dict": prefixed("model."), "hyper_parameters": {"a": 1}, "pytorch-lightning_version": "2.6"},
    "twice": {"model": {"state_dict": STATE}},
    "averaged": {"model": prefixed("", {k: v * 0 for k, v in STATE.items()}), "average": prefixed("module.")},
    "without-counts": {k: v for k, v in STATE.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("held", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_and_prefixes_are_understood(tmp_path, held):
    state, said = loaded(tmp_path, held)
    counts = [key for key in STATE if key.endswith("num_batches_tracked")]
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)
    if held is WRAPPED["without-counts"]:
        assert said.startswith(f"loaded {ALL - len(counts)} of {ALL} tensors from FILE (left: {counts[0]}")
    else:
        assert said == f"loaded {ALL} of {ALL} tensors from FILE"


@pytest.mark.parametrize("held", [STATE, prefixed("module."), {k: v for k, v in STATE.items() if k not in FC}])
def test_a_classifier_of_other_classes_keeps_its_start_and_is_named(tmp_path, held):
    state, said = loaded(tmp_path, held, classes=10)
    assert said == f"loaded {ALL - 2} of {ALL} tensors from FILE (left: fc.weight, fc.bias)"
    assert torch.equal(state["conv1.weight"], STATE["conv1.weight"])
    assert state["fc.weight"].shape == (10, 64)


class Pickled(nn.Linear):
    """A module, as torch.save keeps one whole."""


MISFITS = {
    "another-model": ({"strange": torch.zeros(1)}, r"has 0 of the \d+ tensors of model.name=resnet8 \(conv1.weight"),
    "a-part": (
        {k: v for k, v in STATE.items() if not k.startswith("blocks.1.")},
        r"has \d+ of the \d+ tensors of model.name=resnet8 \(blocks.1.conv1.weight .* is not there\): name the model",
    ),
    "a-shape": (
        {**STATE, "bn1.weight": torch.zeros(3)},
        r"has \d+ of the \d+ tensors .*\(bn1.weight \[16\] is \[3\] there\)",
    ),
    "a-module": (Pickled(2, 2), r"holds more than tensors \(a pickled module\?\).*torch.save\(model.state_dict\(\)"),
    "a-list": ([1, 2], "holds no state_dict but a list"),
    "numbers": ({"lr": 0.1}, "holds no state_dict but a dict"),
}


@pytest.mark.parametrize(("held", "said"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, held, said):
    with pytest.raises(UserError, match=said) as raised:
        loaded(tmp_path, held)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut short"], ids=["empty", "text", "cut"])
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model.weights=.*weights.pt (is no file of torch.save|holds more than)"):
        models.build(ModelConfig("resnet8", weights=str(path)), 10)


@pytest.mark.parametrize("weights", ["IMAGENET1K_V9", "missing.pt"])
def test_unknown_weights(weights):
    with pytest.raises(UserError, match=rf"model.weights={weights}: neither a file nor"):
        models.build(ModelConfig("resnet18", weights=weights), num_classes=10)
