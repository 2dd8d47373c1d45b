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


def file_of(tmp_path, name, state):
    path = tmp_path / name
    torch.save(state, path)
    return str(path)


HEADS = {
    "lraspp_mobilenet_v3_large": ["classifier.low_classifier", "classifier.high_classifier"],
    "deeplabv3_mobilenet_v3_large": ["classifier.4", "aux_classifier.4"],
}


@pytest.mark.parametrize("name", HEADS)
def test_both_heads_of_a_segmentation_model_keep_their_start(tmp_path, name):
    trained, said = models.build(ModelConfig(name), 21).state_dict(), []
    weights = file_of(tmp_path, "weights.pt", trained)
    state = models.build(ModelConfig(name, weights=weights), 5, said.append).state_dict()
    left = [f"{head}.{kind}" for head in HEADS[name] for kind in ("weight", "bias")]
    assert said == [f"loaded {len(trained) - 4} of {len(trained)} tensors from {weights} (left: {', '.join(left)})"]
    assert [key for key in trained if not torch.equal(trained[key], state[key])] == left


def test_three_layers_that_are_missing_are_refused(tmp_path):
    weights = {k: v for k, v in STATE.items() if not k.startswith(("fc.", "bn1.", "blocks.0.bn1"))}
    with pytest.raises(UserError, match=r"bn1.weight \[16\] is not there"):
        models.build(ModelConfig("resnet8", weights=file_of(tmp_path, "weights.pt", weights)), 16)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", HEADS)
def test_a_backbone_starts_from_a_classifier(tmp_path, name, prefix):
    """mobilenet_v3_large's layers are named features.0 there, and backbone.0 here."""
    classifier, said = models.build(ModelConfig("mobilenet_v3_large"), 10).state_dict(), []
    weights = file_of(tmp_path, "classifier.pt", prefixed(prefix, classifier))
    model = models.build(ModelConfig(name, backbone_weights=weights), 5, said.append)
    backbone = model.backbone.state_dict()
    assert said == [f"loaded {len(backbone)} of {len(backbone)} tensors from {weights}"]
    assert all(torch.equal(value, classifier[f"features.{key}"]) for key, value in backbone.items())


def test_torchvisions_own_weights_of_a_backbone_are_the_classifiers(monkeypatch):
    classifier, asked = models.build(ModelConfig("mobilenet_v3_large"), 1000).state_dict(), []
    monkeypatch.setattr(
        "torchvision.models._api.WeightsEnum.get_state_dict", lambda self, **_: asked.append(str(self)) or classifier
    )
    model = models.build(ModelConfig("lraspp_mobilenet_v3_large", backbone_weights="DEFAULT"), 5)
    assert asked == ["MobileNet_V3_Large_Weights.IMAGENET1K_V2"]
    assert torch.equal(model.backbone.state_dict()["0.0.weight"], classifier["features.0.0.weight"])


NO_BACKBONE = {
    "without-one": ("unet", STATE, r"model.name=unet has no part named backbone or encoder; model.weights=FILE loads"),
    "another": (
        "lraspp_mobilenet_v3_large", STATE,
        r"has 0 of the 308 tensors of the backbone of model.name=lraspp_mobilenet_v3_large \(0.0.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "state", "said"), NO_BACKBONE.values(), ids=NO_BACKBONE)
def test_a_backbone_that_does_not_fit_is_refused_in_one_line(tmp_path, name, state, said):
    weights = file_of(tmp_path, "weights.pt", state)
    with pytest.raises(UserError, match=rf"model.backbone_weights=.*weights.pt.*{said}") as raised:
        models.build(ModelConfig(name, backbone_weights=weights), 5)
    assert "\n" not in str(raised.value)


def test_weights_of_the_whole_and_of_the_backbone_are_one_too_many():
    with pytest.raises(UserError, match="the former hold a backbone too; choose one of the two"):
        ModelConfig("lraspp_mobilenet_v3_large", weights="DEFAULT", backbone_weights="DEFAULT")


@pytest.mark.parametrize("key", ["weights", "backbone_weights"])
def test_a_path_where_nothing_is_is_refused_before_any_rank_starts(key):
    with pytest.raises(UserError, match=rf"model.{key}=a/b.pt: neither a file nor"):
        models.refuse_missing(ModelConfig("lraspp_mobilenet_v3_large", **{key: "a/b.pt"}))


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
