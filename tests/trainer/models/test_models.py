"""Every name that model.name may take, and what a wrong one is told."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from syncbn.trainer import models
from syncbn.trainer.errors import UserError
from syncbn.trainer.models import ModelConfig


def mine(num_classes, width=3):
    return nn.Linear(width, num_classes)


def not_a_model(num_classes):
    return num_classes


@pytest.mark.parametrize(("name", "parameters"), [("resnet20", 269_722), ("resnet56", 853_018), ("resnet8", 75_290)])
def test_small_resnets_have_the_published_size(name, parameters):
    model = models.build(ModelConfig(name), num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "regnet_y_400mf", "googlenet"])
def test_torchvision_models_by_name(name):
    assert models.build(ModelConfig(name), num_classes=7)(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something is fetched")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "heads"), [("lraspp_mobilenet_v3_large", {"out"}), ("deeplabv3_mobilenet_v3_large", {"out", "aux"})]
)
def test_torchvisions_segmentation_models_start_from_scratch_with_all_their_heads(name, heads):
    model = models.build(ModelConfig(name), num_classes=7).eval()
    scores = model(torch.zeros(1, 3, 65, 71))  # sides that no stride divides
    assert scores.keys() == heads
    assert {score.shape for score in scores.values()} == {(1, 7, 65, 71)}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_an_aux_head_can_be_left_out(name, monkeypatch):
    module = "torchvision.models.segmentation." + ("fcn" if name.startswith("fcn") else "deeplabv3")
    monkeypatch.setattr(f"{module}.resnet50", lambda **_: nn.ModuleDict({"layer3": nn.ReLU(), "layer4": nn.ReLU()}))
    assert models.build(ModelConfig(name), 2).aux_classifier is not None
    assert models.build(ModelConfig(name, options={"aux_loss": False}), 2).aux_classifier is None


def test_options_are_the_builders_keyword_arguments():
    model = models.build(ModelConfig("unet", options={"depth": 1, "width": 4}), num_classes=2)
    assert (len(model.down), model.head.in_channels) == (1, 4)
    assert models.build(ModelConfig("resnet8", options={"width": 8}), num_classes=2).fc.in_features == 32
    assert models.build(ModelConfig("squeezenet1_1", options={"dropout": 0.1}), 2).classifier[0].p == 0.1
    assert models.build(ModelConfig(f"{__name__}:mine", options={"width": 5}), num_classes=4).in_features == 5


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "unet",
            {"widht": 4},
            "unexpected keyword argument 'widht'): give keyword arguments of its builder (depth, wi",
        ),
        ("unet", {"width": 0}, "(depth=3, width=0: give a depth of 0 or more and a width of 1 or more)"),
        ("unet", {"width": "wide"}, "model.options={'width': 'wide'} do not fit model.name=unet ("),
        (
            "resnet8",
            {"depth": 9},
            "got multiple values for argument 'depth'): give keyword arguments of its builder (w",
        ),
        ("resnet18", {"widht": 4}, "do not fit model.name=resnet18 (ResNet.__init__() got an unexpected keyword"),
        ("lraspp_mobilenet_v3_large", {"aux_loss": True}, "(This model does not use auxiliary loss)"),
        (f"{__name__}:mine", {"depth": 4}, "unexpected keyword argument 'depth'): give keyword arguments of its buil"),
    ],
)
def test_options_that_a_builder_does_not_take_are_told_in_one_line(name, options, said):
    with pytest.raises(UserError) as raised:
        models.build(ModelConfig(name, options=options), num_classes=2)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_error_inside_a_builder_of_the_users_own_is_its_own_with_options_too():
    with pytest.raises(RuntimeError, match="negative dimension"):
        models.build(ModelConfig(f"{__name__}:mine", options={"width": -1}), num_classes=2)


INSTALLED = importlib.util.find_spec("segmentation_models_pytorch") is not None


@pytest.mark.skipif(not INSTALLED, reason="needs segmentation-models-pytorch, the extra segment")
def test_models_of_segmentation_models_pytorch_take_images_of_any_size():
    model = models.build(ModelConfig("smp/FPN/resnet18", options={"decoder_pyramid_channels": 64}), 7).eval()
    assert type(model).__name__ == "FPN"
    for size in (64, 64), (65, 71):
        assert model(torch.zeros(1, 3, *size)).shape == (1, 7, *size)
    images = torch.randn(1, 3, 65, 71)
    padded = nn.functional.pad(images, (0, 25, 0, 31))
    assert torch.equal(model(images), model(padded)[..., :65, :71])


@pytest.mark.skipif(not INSTALLED, reason="needs segmentation-models-pytorch, the extra segment")
@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("smp/unett/resnet18", {}, "no such architecture; near it: unet"),
        ("smp/unet/resnet19", {}, "no such encoder; near it: resnet18"),
        ("smp/dpt/resnet18", {}, "cannot be built (Only Timm encoders"),
        (
            "smp/unet/resnet18",
            {"width": 3},
            "do not fit model.name=smp/unet/resnet18 (unet takes no width, but encoder",
        ),
    ],
)
def test_a_wrong_name_of_theirs_is_told_in_one_line(name, options, said):
    with pytest.raises(UserError) as raised:
        models.build(ModelConfig(name, options=options), num_classes=2)
    assert said in str(raised.value)


def test_without_the_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(UserError, match=r"is not installed \(.*\): pip install -e '.\[segment\]'"):
        models.build(ModelConfig("smp/unet/resnet18"), num_classes=2)
    project = Path(__file__).parents[3] / "pyproject.toml"
    assert '\nsegment = ["segmentation-models-pytorch' in project.read_text()


def test_a_model_of_the_users_own():
    assert models.build(ModelConfig(f"{__name__}:mine"), num_classes=4).out_features == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet21", "no such model; near it: resnet32, resnet20"),
        ("u-net", "no such model; near it: unet"),
        ("lrasp_mobilenet_v3_large", "no such model; near it: lraspp_mobilenet_v3_large"),
        ("no_such:builder", "No module named 'no_such'"),
        (f"{__name__}:nothing", "has no attribute 'nothing'"),
        (f"{__name__}:not_a_model", "it must return an nn.Module"),
    ],
)
def test_a_wrong_name_is_told_in_one_line(name, said):
    with pytest.raises(UserError) as raised:
        models.build(ModelConfig(name), num_classes=2)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
