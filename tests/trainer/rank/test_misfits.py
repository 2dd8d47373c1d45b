"""What a rank refuses before it reads any data, and what it says of norms that came frozen."""

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from syncbn.trainer import norms
from syncbn.trainer.config import typed
from syncbn.trainer.errors import UserError
from syncbn.trainer.norms import NormConfig, Place
from syncbn.trainer.rank import opening
from syncbn.trainer.rank.build import Parts, build
from syncbn.trainer.tasks.classify import Classify
from syncbn.trainer.world import World

ALONE = World(0, 1, torch.device("cpu"))


class Ragged(Classify):
    fixed_shapes = False


def ragged(config, classes):
    return Ragged(classes=classes)


OWN = {"name": f"{__name__}:ragged"}
MISFITS = {
    "classify": (
        {"model": {"name": "ssdlite320_mobilenet_v3_large"}},
        "finds boxes, of which task=classify knows noth",
    ),
    "segment": (
        {"model": {"name": "retinanet_resnet50_fpn"}, "task": {"name": "segment"}},
        "model.name=retinanet_resnet50_fpn finds boxes, of which task=segment knows nothing: take task=detect",
    ),
    "compile": ({"task": OWN, "train": {"compile": True}}, "a graph does the same in each step, .*; train.compile=fal"),
    "cuda-graph": ({"task": OWN, "train": {"cuda_graph": True}}, "train.cuda_graph=true with task=.*: a graph does"),
}


@pytest.mark.parametrize(("settings", "said"), MISFITS.values(), ids=MISFITS)
def test_a_task_that_cannot_have_such_a_model_or_graph_is_refused_in_one_line(settings, said, monkeypatch):
    monkeypatch.setattr("syncbn.trainer.rank.build.cuda_graph.prepare", lambda device: None)
    with pytest.raises(UserError, match=said) as raised:
        build(typed({"data": {"name": "image_folder", "root": "nowhere"}, **settings}), ALONE)
    assert "\n" not in str(raised.value)


def test_frozen_norms_are_told_beside_those_that_were_converted():
    model = nn.Sequential(nn.BatchNorm2d(4), FrozenBatchNorm2d(4), FrozenBatchNorm2d(4))
    model, converted = norms.convert(model, NormConfig(), Place(torch.device("cpu")))
    parts = Parts(None, model, converted, None)
    assert opening.converted(parts, typed({})) == (
        "norm=sync: 1 of 3 batch norm layers converted, 2 frozen (model.unfreeze_norms=true makes them live)"
    )
