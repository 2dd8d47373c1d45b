"""Rates, decay and their course over the steps."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.trainer.errors import UserError
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


HALF_WAY = {"cosine": 1 / 2, "poly": 0.5**0.9}


@pytest.mark.parametrize(("name", "half_way"), HALF_WAY.items())
def test_the_rate_rises_then_falls(name, half_way):
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=2.0)
    config = ScheduleConfig(name, warmup_epochs=2, final=0.1)
    schedule = optim.build_schedule(config, optimizer, steps=104, steps_per_epoch=2)
    rates = []
    for _ in range(104):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[54] == pytest.approx(2 * (0.1 + 0.9 * half_way))
    assert rates == rates[:5] + sorted(rates[5:], reverse=True)
    assert schedule.get_last_lr()[0] == pytest.approx(0.2)


def test_poly_falls_by_its_power():
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=1.0)
    config = ScheduleConfig("poly", warmup_epochs=0, power=2.0)
    schedule = optim.build_schedule(config, optimizer, steps=4, steps_per_epoch=1)
    rates = [schedule.lr_lambdas[0](step) for step in range(6)]
    assert rates == pytest.approx([1, 9 / 16, 4 / 16, 1 / 16, 0, 0])  # behind the end, too


def shares(config, steps, steps_per_epoch):
    """The rate of each step, where 1 is the peak."""
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=1.0)
    schedule = optim.build_schedule(config, optimizer, steps=steps, steps_per_epoch=steps_per_epoch)
    return [schedule.lr_lambdas[0](step) for step in range(steps)]


def test_multistep_falls_at_its_milestones_in_epochs():
    config = ScheduleConfig("multistep", warmup_epochs=0, milestones=[1.5, 2], gamma=0.2)
    assert shares(config, 10, 4) == pytest.approx([1.0] * 6 + [0.2] * 2 + [0.04] * 2)


def test_a_milestone_within_the_warm_up_counts_too():
    config = ScheduleConfig("multistep", warmup_steps=3, milestones=[1])
    assert shares(config, 5, 2) == pytest.approx([1 / 4, 2 / 4, 0.1 * 3 / 4, 0.1, 0.1])


@pytest.mark.parametrize("name", ["cosine", "poly"])
def test_a_warm_up_in_steps_takes_the_place_of_that_in_epochs(name):
    in_steps = shares(ScheduleConfig(name, warmup_steps=6), 40, 10)
    assert in_steps == shares(ScheduleConfig(name, warmup_epochs=0.6), 40, 10)
    assert in_steps[:7] == pytest.approx([(step + 1) / 7 for step in range(7)])
    assert shares(ScheduleConfig(name, warmup_steps=99), 3, 10) == pytest.approx([1 / 4, 2 / 4, 3 / 4])


def headed():
    """A backbone and two heads, of which one has a part of its own."""
    parts = {"backbone": MODEL, "head": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "header": nn.Linear(2, 2)}
    return nn.ModuleDict(parts)


def rates_of(model, factors, name="sgd"):
    """The rate of each parameter, where 1 is the base's, and that which is logged."""
    optimizer = optim.build(OptimConfig(name, lr=1.0, scaling="none", lr_factors=factors), model, 8)
    by_parameter = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {n: by_parameter[p] for n, p in model.named_parameters()}, optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("factors", "of_head", "of_its_norm"),
    [
        ({}, 1, 1),
        ({"head": 10}, 10, 10),
        ({"head": 10, "head.1": 0.5}, 10, 0.5),
        ({"head.1": 0.5, "head": 10}, 10, 0.5),
        ({"head": {"1": 0.5}}, 1, 0.5),
        ({"head.0.weight": 3, "head.0.bias": 3}, 3, 1),
    ],
)
def test_parts_have_rates_of_their_own_by_name(factors, of_head, of_its_norm, name):
    rates, base = rates_of(headed(), factors, name)
    assert base == 1
    for parameter, rate in rates.items():
        own = {"head.0": of_head, "head.1": of_its_norm}.get(parameter.rpartition(".")[0], 1)
        assert rate == own, parameter


def test_a_name_counts_without_what_ddp_and_compile_put_before_it(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = headed()
        model.forward = lambda x: x
        model["head"] = torch.compile(model["head"])
        rates, _ = rates_of(DistributedDataParallel(model), {"head": 10})
    finally:
        torch.distributed.destroy_process_group()
    assert {name for name, rate in rates.items() if rate == 10} == {
        f"module.head._orig_mod.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")
    }


@pytest.mark.parametrize(("prefix", "frozen"), [("classifier", False), ("hea", False), ("head", True)])
def test_a_rate_that_no_parameter_has_is_refused(prefix, frozen):
    model = headed()
    model["head"].requires_grad_(not frozen)
    parts = "backbone, header" if frozen else "backbone, head, header"
    said = (
        rf"^optim.lr_factors.{prefix}=10: no parameter that trains has a name .*; the parts of the model are {parts}$"
    )
    with pytest.raises(UserError, match=said):
        optim.build(OptimConfig(lr_factors={prefix: 10}), model, 8)


def test_another_rate_is_kept_over_the_schedule():
    optimizer = optim.build(OptimConfig(lr_factors={"head": 10}), headed(), 8)
    schedule = optim.build_schedule(ScheduleConfig("poly"), optimizer, steps=9, steps_per_epoch=3)
    for _ in range(8):
        optimizer.step()
        schedule.step()
        base, *_, head = [group["lr"] for group in optimizer.param_groups]
        assert head == pytest.approx(10 * base)


@pytest.mark.parametrize("milestones", [[2, 1], [1, 1], [0, 1], [-1]])
def test_milestones_ascend(milestones):
    with pytest.raises(UserError, match=r"milestones=\[.*\]: give epochs above 0, each later"):
        ScheduleConfig("multistep", milestones=milestones)
