"""Every name that model.name may take, and what a wrong one is told."""

import pytest
import torch
from torch import nn

from syncbn.trainer import models
from syncbn.trainer.errors import UserError
from syncbn.trainer.models import ModelConfig


def mine(num_classes):
    return nn.Linear(3, num_classes)


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


def test_a_model_of_the_users_own():
    assert models.build(ModelConfig(f"{__name__}:mine"), num_classes=4).out_features == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet21", "no such model; near it: resnet32, resnet20"),
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
