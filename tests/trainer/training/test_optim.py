"""Rates, decay and their course over the steps."""

import pytest
import torch
from torch import nn

from syncbn.trainer.training import optim
from syncbn.trainer.training.optim import OptimConfig, ScheduleConfig

MODEL = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_do_not_decay_unless_asked(name):
    decays = {
        asked: {
            p.ndim: group["weight_decay"]
            for group in optim.build(
                OptimConfig(name, weight_decay=0.1, decay_norms_and_biases=asked), MODEL, 8
            ).param_groups
            for p in group["params"]
        }
        for asked in (False, True)
    }
    assert decays == {False: {4: 0.1, 2: 0.1, 1: 0.0}, True: {4: 0.1, 2: 0.1, 1: 0.1}}


def test_every_trainable_parameter_is_optimised_once():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    groups = optim.build(OptimConfig(), nn.Sequential(MODEL, frozen), 8).param_groups
    assert sorted(map(id, (p for g in groups for p in g["params"]))) == sorted(map(id, MODEL.parameters()))


@pytest.mark.parametrize(("scaling", "lr"), [("linear", 0.025), ("sqrt", 0.05), ("none", 0.1)])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_rate_is_scaled_to_the_images_of_a_step(name, scaling, lr):
    config = OptimConfig(name, lr=0.1, lr_batch=256, scaling=scaling)
    assert [group["lr"] for group in optim.build(config, MODEL, 64).param_groups] == pytest.approx([lr, lr])


def test_the_rate_rises_then_falls_along_a_cosine():
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=2.0)
    schedule = optim.build_schedule(ScheduleConfig(warmup_epochs=2, final=0.1), optimizer, steps=104, steps_per_epoch=2)
    rates = []
    for _ in range(104):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[54] == pytest.approx(2 * (0.1 + 0.9 / 2))  # half-way down
    assert rates == rates[:5] + sorted(rates[5:], reverse=True)
    assert schedule.get_last_lr()[0] == pytest.approx(0.2)
