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
