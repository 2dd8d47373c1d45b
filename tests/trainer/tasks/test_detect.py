"""Detection: each loss divided by what all ranks have of it, exact for any split, and no rank without a message."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

from syncbn.trainer import norms
from syncbn.trainer.data import Batch
from syncbn.trainer.models.residual import SmallResNet
from syncbn.trainer.models.ssd import small_ssd
from syncbn.trainer.tasks.detect import Detect
from syncbn.trainer.training.bad_steps import Guard
from syncbn.trainer.training.loop import optimiser_step
from syncbn.trainer.training.options import TrainConfig
from syncbn.trainer.training.state import Training
from syncbn.trainer.training.totals import Totals
from tests.ranks import run_ranks
from tests.trainer.tasks.given import Given
from tests.trainer.trained import ranks_world

CLASSES = ["cat", "dog"]
SIDE = 48


def sample(seed, objects, crowds=0):
    """An image of SIDE pixels with so many objects, and so many crowds among them."""
    torch.manual_seed(seed)
    corners = torch.rand(objects, 2, dtype=torch.float64) * (SIDE - 20)
    boxes = torch.cat([corners, corners + 8 + 10 * torch.rand(objects, 2, dtype=torch.float64)], 1)
    target = {
        "boxes": boxes,
        "labels": torch.randint(1, 3, (objects,)),
        "areas": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        "crowd": torch.arange(objects) < crowds,
        "masks": torch.ones(objects, SIDE, SIDE, dtype=torch.uint8),
    }
    return torch.rand(3, SIDE, SIDE, dtype=torch.float64), target


def batch_of(samples):
    return Batch([image for image, _ in samples], [target for _, target in samples])


class Body(nn.Module):
    """Features at a stride of 4, as the backbones of torchvision's detectors give them."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.net = SmallResNet(8, 2, width=8)
        self.net.fc = nn.Identity()  # DDP waits for a gradient of every parameter

    def forward(self, x):
        net = self.net
        return {"0": net.blocks(torch.relu(net.bn1(net.conv1(x))))}


def anchors():
    return AnchorGenerator(((12,),), ((0.5, 1.0, 2.0),))


def ssdlite():
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    model.transform.fixed_size = (96, 96)
    return model


def retinanet():
    head = RetinaNetHead(32, 3, 3, norm_layer=nn.BatchNorm2d)
    return detection.RetinaNet(Body(), 3, min_size=SIDE, max_size=SIDE, anchor_generator=anchors(), head=head)


def fcos():
    one = AnchorGenerator(((8,),), ((1.0,),))
    return detection.FCOS(Body(), 3, min_size=SIDE, max_size=SIDE, anchor_generator=one)


def rcnn(build=detection.FasterRCNN):
    """It takes all boxes and anchors, so that nothing is left to chance."""
    pool = detection.faster_rcnn.MultiScaleRoIAlign(["0"], 7, 2)
    return build(
        Body(), 3, min_size=SIDE, max_size=SIDE, rpn_anchor_generator=anchors(), box_roi_pool=pool,
        rpn_batch_size_per_image=10**6, rpn_positive_fraction=1.0, box_batch_size_per_image=10**6,
        box_positive_fraction=1.0,
    )  # fmt: skip


def mask_rcnn():
    return rcnn(lambda *a, **k: detection.MaskRCNN(*a, mask_roi_pool=k["box_roi_pool"], **k))


MODELS = {
    "ours": lambda: small_ssd(3, width=4),
    "ssdlite": ssdlite,
    "retinanet": retinanet,
    "fcos": fcos,
    "faster-rcnn": rcnn,
    "mask-rcnn": mask_rcnn,
}


def step(rank, name, shares):
    """The weights after a step of SGD on this rank's share of the samples."""
    world = ranks_world(rank)
    torch.manual_seed(0)
    config = norms.NormConfig(momentum=0.1)
    model, _ = norms.convert(MODELS[name]().double(), config, norms.Place(world.device, len(shares)))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    task = Detect(CLASSES, masks=name == "mask-rcnn")
    data = Given(sum(map(len, shares)))
    training = Training(ddp, task, data, optimizer, None, Guard(model, optimizer), Totals(task.shapes, world))
    bad, [(sums, _, _)] = optimiser_step(training, TrainConfig(), world, [batch_of(shares[rank])])
    assert not bad
    return model.state_dict(), sums


OBJECTS = {"everywhere": [1, 5, 2], "one-image-without": [4, 0, 2], "nowhere": [0, 0, 0], "crowds": [3, 2, 3]}


def samples_with(objects):
    return [sample(i, number, crowds=objects == "crowds" and i == 1) for i, number in enumerate(OBJECTS[objects])]


# torchvision's R-CNN computes in float32 what its anchors are to predict
CLOSE = {name: {"rtol": 1e-6, "atol": 1e-8} if "rcnn" in name else {"rtol": 1e-9, "atol": 1e-10} for name in MODELS}


@pytest.mark.plain(
    "ours-nowhere", "ssdlite-one-image-without", "retinanet-one-image-without", "fcos-everywhere", "mask-rcnn-crowds"
)
@pytest.mark.parametrize("objects", OBJECTS)
@pytest.mark.parametrize("name", MODELS)
def test_ranks_of_one_image_equal_one_rank_with_all(name, objects):
    samples = samples_with(objects)
    ((want, _),) = run_ranks(step, 1, name, [samples])

    for weights, _ in run_ranks(step, 3, name, [[each] for each in samples]):
        assert_close(weights, want, **CLOSE[name])


@pytest.mark.plain("ours", "retinanet", "mask-rcnn")
@pytest.mark.parametrize("name", MODELS)
def test_a_rank_without_an_image_takes_part_in_all_messages_and_changes_nothing(name):
    samples = samples_with("everywhere")
    ((want, _),) = run_ranks(step, 1, name, [samples])

    for weights, _ in run_ranks(step, 3, name, [samples[:2], [], samples[2:]]):
        assert_close(weights, want, **CLOSE[name])
