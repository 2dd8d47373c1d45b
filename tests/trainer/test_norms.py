"""norm= changes what it says, counts it, and says why it found nothing."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import syncbn
from syncbn.trainer import norms
from syncbn.trainer.errors import UserError
from syncbn.trainer.norms import NormConfig

CPU = torch.device("cpu")


def test_sync_converts_every_batch_norm():
    model, converted = norms.convert(torchvision.models.resnet18(), NormConfig("sync"), CPU)
    assert converted == 20
    assert sum(isinstance(m, syncbn.SyncBatchNorm) for m in model.modules()) == 20
    assert norms.synchronised(model)


def test_fusing_converts_as_many_and_computes_the_same():
    torch.manual_seed(0)
    plain = torchvision.models.resnet18().double()
    fused = copy.deepcopy(plain)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    assert norms.convert(plain, NormConfig("sync"), CPU)[1] == 20
    assert norms.convert(fused, NormConfig("sync", fuse=True), CPU)[1] == 20
    assert type(fused.layer1[0]).__name__ == "FusedBasicBlock"
    torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize(("group", "everywhere_the_same"), [("world", True), ("node", False), (2, False)])
def test_layers_of_a_group_are_the_same_on_its_ranks_alone(group, everywhere_the_same):
    model, converted = norms.convert(torchvision.models.resnet18(), NormConfig("sync", group), CPU)
    assert converted == 20
    assert {m.group for m in norms.batch_norms(model)} == {group}
    assert norms.synchronised(model) is everywhere_the_same


@pytest.mark.parametrize(
    ("group", "ranks", "fits"),
    [("world", 3, True), ("node", 3, True), (1, 3, True), (3, 3, True), (2, 3, False), (4, 2, False)],
)
def test_a_group_must_divide_the_ranks(group, ranks, fits):
    if fits:
        norms.refuse_misfit(NormConfig("sync", group), ranks)
    else:
        with pytest.raises(UserError, match=rf"norm.group={group} does not divide the {ranks} ranks") as refused:
            norms.refuse_misfit(NormConfig("sync", group), ranks)
        assert refused.value.on_every_rank


@pytest.mark.parametrize("name", ["local", "torch"])
def test_only_sync_has_groups(name):
    with pytest.raises(UserError, match=f"norm.group=2 with norm={name}: only norm=sync has groups"):
        NormConfig(name, 2)


@pytest.mark.parametrize("name", ["local", "torch"])
def test_only_sync_fuses(name):
    with pytest.raises(UserError, match=f"norm.fuse=true with norm={name}: only norm=sync fuses"):
        NormConfig(name, fuse=True)


def test_local_changes_nothing():
    model, converted = norms.convert(torchvision.models.resnet18(), NormConfig("local"), CPU)
    assert converted == 0
    assert not norms.synchronised(model)


def test_torch_is_refused_without_gpus():
    with pytest.raises(UserError, match=r"norm=torch on cpu: .* take norm=sync"):
        norms.convert(nn.BatchNorm2d(3), NormConfig("torch"), CPU)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Linear(2, 2), "the model has no normalisation layer"),
        (
            nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)),
            "the model has LayerNorm ×2, and only batch norm layers that take statistics are converted",
        ),
        (torchvision.ops.FrozenBatchNorm2d(3), "the model has FrozenBatchNorm2d ×1"),
    ],
)
def test_nothing_to_convert_says_why(model, reason):
    assert norms.convert(model, NormConfig("sync"), CPU)[1] == 0
    assert reason in norms.nothing_converted(model)
