"""norm= changes what it says, counts it, and says why it found nothing."""

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
