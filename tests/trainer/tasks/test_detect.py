"""Detection: each loss divided by what all ranks have of it, exact for any split, and no rank without a message."""

import json
import re

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

from syncbn.trainer import norms
from syncbn.trainer.config import typed
from syncbn.trainer.data import Batch
from syncbn.trainer.errors import UserError
from syncbn.trainer.models.residual import SmallResNet
from syncbn.trainer.models.ssd import small_ssd
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.tasks.detect import Detect
from syncbn.trainer.training.bad_steps import Guard
from syncbn.trainer.training.evaluation import measure
from syncbn.trainer.training.loop import fit, optimiser_step
from syncbn.trainer.training.options import TrainConfig
from syncbn.trainer.training.state import Training
from syncbn.trainer.training.totals import Totals
from tests.launch.jobs import PYTHON, finished
from tests.ranks import run_ranks
from tests.trainer.tasks.given import Given
from tests.trainer.trained import DETECTION, ranks_world

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


def test_crowds_are_not_learnt_from():
    image, target = sample(0, 3, crowds=1)
    kept = {name: value[1:] for name, value in target.items()}
    torch.manual_seed(0)
    model = retinanet().double()
    losses = [Detect(CLASSES).loss(model, Batch([image], [each])).total.item() for each in (target, kept)]
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("name", MODELS)
def test_on_one_rank_the_loss_is_the_models_own(name):
    """What is optimised, and what is shown of it."""
    torch.manual_seed(0)
    batch, model, task = batch_of(samples_with("everywhere")), MODELS[name]().double(), Detect(CLASSES, "mask" in name)
    loss = task.loss(model, batch)
    learnt_from = ("boxes", "labels", "masks") if "mask" in name else ("boxes", "labels")
    own = model([*batch.images], [{part: target[part] for part in learnt_from} for target in batch.labels])
    want = sum(own.values()).item()
    assert (loss.total / loss.weight).sum().item() == pytest.approx(want, rel=1e-6)
    assert task.figures(loss.sums)["loss"] == pytest.approx(want, rel=1e-6)


def learnt(rank):
    """A small detector after some steps on digit scenes."""
    world = ranks_world(rank)
    torch.set_num_threads(1)  # as it is to be evaluated
    scenes = {**DETECTION["data"], "scenes": 100, "augment": {}}
    model = {**DETECTION["model"], "options": {"width": 8}}
    settings = {"train": {"steps": 40}, "optim": {"lr": 0.02, "scaling": "none"}, "schedule": {"warmup_epochs": 0.1}}
    config = typed({**DETECTION, "data": scenes, "model": model, **settings})
    training = assemble(build(config, world), config, world)
    fit(training, config.train, world)
    return training.model.module.state_dict()


def evaluated(rank, state):
    world = ranks_world(rank)
    torch.set_num_threads(1)  # or convolutions add up in another order
    config = typed(
        {
            **DETECTION,
            "data": {**DETECTION["data"], "scenes": 68},
            "model": {**DETECTION["model"], "options": {"width": 8}},
        }
    )
    parts = build(config, world)
    parts.model.load_state_dict(state)
    return measure(parts.model, parts.task, parts.data.eval, TrainConfig(), world)


def test_figures_and_curves_are_the_same_to_the_last_digit_for_any_number_of_ranks():
    (state,) = run_ranks(learnt, 1)
    ((want, curves),) = run_ranks(evaluated, 1, state)
    assert want["eval/images"] == 17
    assert 0.001 < want["eval/ap50"] < 1
    assert len(curves[0].lines) == 10
    for ranks in 2, 3:
        for figures, again in run_ranks(evaluated, ranks, state):
            assert (figures, again) == (want, curves)


def test_no_prediction_at_all_is_an_ap_of_0():
    task, (image, target) = Detect(CLASSES), sample(0, 3)
    model = small_ssd(3, width=2, score_thresh=2.0).eval().double()
    with torch.no_grad():
        sums = task.evaluate(model, Batch([image], [target]))
    assert [rows.shape for rows in sums["predictions"]] == [(0, 6)]
    assert task.figures(sums)["ap"] == task.figures(sums)["ap50"] == 0.0


def test_an_eval_batch_without_an_image_has_no_rows():
    sums = Detect(CLASSES).evaluate(nn.Identity().eval(), Batch([], []))
    assert (sums["predictions"], sums["truth"]) == ([], [])


class Strange(nn.Module):
    """A model that is called as a detector, and returns what it is told to."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, images, targets=None):
        return self.output


BOX, SCORE = torch.zeros(2, 4), torch.zeros(2)


@pytest.mark.parametrize(
    "output",
    [SCORE, [], [{}], [{"boxes": BOX, "scores": SCORE}], [{"boxes": BOX.T, "scores": SCORE, "labels": SCORE}]],
    ids=["a tensor", "no image", "no boxes", "no labels", "boxes the other way"],
)
def test_predictions_of_another_shape_are_refused(output):
    with pytest.raises(UserError, match=r"in eval, for 1 images, is none of boxes: .* take \(images, targets\)"):
        Detect(CLASSES).evaluate(Strange(output).eval(), batch_of([sample(0, 1)]))


@pytest.mark.parametrize("output", [SCORE, {}, {"loss": 1.0}], ids=["a tensor", "none", "a number"])
def test_losses_of_another_kind_are_refused(output):
    with pytest.raises(UserError, match="in training: its forward must take"):
        Detect(CLASSES).loss(Strange(output), batch_of([sample(0, 1)]))


def test_a_classifier_is_refused():
    with pytest.raises(UserError, match="cannot train SmallResNet: its forward must take"):
        Detect(CLASSES).loss(SmallResNet(8, 3), batch_of([sample(0, 1)]))


def test_mask_rcnn_without_masks_is_refused():
    with pytest.raises(UserError, match=r"MaskRCNN learns from a mask of each object too, and task\.masks=false: "):
        Detect(CLASSES).loss(mask_rcnn().double(), batch_of([sample(0, 1)]))


def test_pictures_have_the_boxes_of_truth_and_prediction_with_names():
    task, (image, target) = Detect(CLASSES), sample(0, 2)
    target["labels"] = torch.tensor([2, 1])
    best = {
        "boxes": BOX + torch.tensor([1.0, 2, 3, 4]),
        "scores": torch.tensor([0.25, 0.75]),
        "labels": torch.tensor([1, 7]),
    }
    (picture,) = task.pictures(Strange([best]).eval(), Batch([image], [target]), [torch.zeros(3, 4, 6)])
    assert [box.name for box in picture.boxes["truth"]] == ["dog", "cat"]
    assert [(*box,) for box in picture.boxes["prediction"]] == [
        (1.0, 2.0, 3.0, 4.0, "class 7", 0.75),
        (1.0, 2.0, 3.0, 4.0, "cat", 0.25),
    ]
    assert task.legend.keys() == {*CLASSES}


@pytest.mark.ci
@pytest.mark.slow
def test_a_run_leaves_figures_pictures_and_weights(tmp_path):
    words = ["task=detect", "train.steps=40", "launch.nproc=2", "run.name=r", "data.scenes=60"]
    code, said = finished(PYTHON, *words, root=tmp_path)
    assert code == 0, said
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["objective"] == result["metrics"]["eval/ap"]
    assert re.search(r"eval/class_ap +\d: \d+", said)
    assert len(list((tmp_path / "r" / "pictures").glob("*.png"))) == 8
    assert ">precision and recall, %</text>" in (tmp_path / "r" / "report.html").read_text()
    code, said = finished(PYTHON, "task=evaluate", f"checkpoint={tmp_path / 'r'}", root=tmp_path / "none")
    assert (code, f"{result['objective']:.2%}" in said) == (0, True), said
