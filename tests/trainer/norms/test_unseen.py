"""A rank without a sample passes something through its model of which no norm takes notice."""

import pytest
import torch
from torch import nn

from syncbn.trainer import norms
from syncbn.trainer.norms.unseen import unseen

HERE = sorted(norms.NORMS.keys() - {"torch"})  # which is for GPUs


@pytest.mark.parametrize("name", HERE)
def test_no_statistics_move_and_every_parameter_has_a_gradient_of_0(name):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.ReLU()
    model, _ = norms.convert(nn.Sequential(*layers), norms.NormConfig(name=name), norms.Place(torch.device("cpu")))
    before = {key: value.clone() for key, value in model.state_dict().items()}

    with unseen(model):
        output = model(torch.randn(1, 3, 9, 9))
    (output * 0).sum().backward()

    assert output.shape == (1, 2, 7, 7)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert not any("running" in key for key in moved)
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_afterwards_it_takes_notice_again():
    model = nn.BatchNorm2d(2)
    with unseen(model):
        model(torch.ones(3, 2, 4, 4))
    assert not model.running_mean.any()
    model(torch.ones(3, 2, 4, 4))
    assert model.running_mean.all()
