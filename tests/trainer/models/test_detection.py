"""torchvision's detectors by name: what torchvision builds, at other sizes, with other anchors, and from weights."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.misc import FrozenBatchNorm2d

from syncbn.trainer import models, norms
from syncbn.trainer.errors import UserError
from syncbn.trainer.models import ModelConfig, backbones, detection, weights
from syncbn.trainer.norms import NormConfig, Place

NAMES = [name for name in detection.names() if not name.startswith("keypoint")]
SSDLITE, SMALL_RCNN = "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"
RETINANET, FCOS, RCNN, SSD = "retinanet_resnet50_fpn", "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn", "ssd300_vgg16"


@pytest.fixture
def meta():
    """Shapes alone, or some of these models would take seconds each."""
    with torch.device("meta"):
        yield


def theirs(name, classes=4, **options):
    options = {"weights": None, "weights_backbone": None, **options}
    return torchvision.models.get_model_builder(name)(num_classes=classes, **options)


def ours(name, classes=4, **keys):
    return models.build(ModelConfig(name, **keys), classes)


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def generator(model):
    return model.rpn.anchor_generator if hasattr(model, "rpn") else model.anchor_generator


def batch_norms(model):
    return [(name, type(m), m.eps) for name, m in model.named_modules() if "BatchNorm" in type(m).__name__]


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("name", NAMES)
def test_each_is_torchvisions_from_scratch_with_live_norms_and_all_trains(name, monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", None)
    model = ours(name)
    assert shapes(model) == shapes(theirs(name))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())


def sample(size=64):
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])} for _ in range(2)]
    return [torch.rand(3, size, size + 16) for _ in range(2)], targets


SHAPED = {
    "ssdlite": (SSDLITE, {"image_size": 96, "anchor_ratios": [1.5]}, 4),
    "ssdlite-sizes": (SSDLITE, {"image_size": 96, "anchor_sizes": [8, 16, 24, 32, 48, 64, 96]}, 6),
    "retinanet": (RETINANET, {"image_size": 64, "anchor_sizes": [8, 16, 32, 64, 96], "anchor_ratios": [1, 2]}, 6),
    "fcos": (FCOS, {"image_size": 64}, 1),
    "rcnn": (SMALL_RCNN, {"image_size": 64, "anchor_sizes": [8, 16], "anchor_ratios": [0.5, 1, 2, 4]}, 8),
}


@pytest.mark.plain("ssdlite", "retinanet", "rcnn")
@pytest.mark.parametrize(("name", "keys", "anchors"), SHAPED.values(), ids=SHAPED)
def test_heads_fit_the_anchors_in_training_and_in_evaluation(name, keys, anchors):
    torch.manual_seed(0)
    model = ours(name, **keys)
    images, targets = sample()
    sum(model(images, targets).values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert set(generator(model).num_anchors_per_location()) == {anchors}
    with torch.no_grad():
        assert [boxes.keys() for boxes in model.eval()(images)] == [{"boxes", "labels", "scores"}] * 2
        (size,) = {(*image.shape[-2:],) for image in model.transform(images)[0].tensors}
    want = (96, 96) if name == SSDLITE else (64, 96)  # 64, 80, padded to a multiple of 32
    assert size == want


OWN = {
    SSDLITE: ([64, 112, 160, 208, 256, 304, 320], [2, 3]),
    SMALL_RCNN: ([32, 64, 128, 256, 512], [0.5, 1, 2]),
    RCNN: ([32, 64, 128, 256, 512], [0.5, 1, 2]),
    "fasterrcnn_resnet50_fpn_v2": ([32, 64, 128, 256, 512], [0.5, 1, 2]),
    RETINANET: ([32, 64, 128, 256, 512], [0.5, 1, 2]),
    "retinanet_resnet50_fpn_v2": ([32, 64, 128, 256, 512], [0.5, 1, 2]),
    SSD: ([21, 45, 99, 153, 207, 261, 315], []),
}


def laid(model, side=320):
    """The anchors of images of so many pixels, on maps of all its strides."""
    images = ImageList(torch.zeros(1, 3, side, side), [(side, side)])
    generate = generator(model)
    maps = [torch.zeros(1, 1, -(-side // 2**i), -(-side // 2**i)) for i in range(4, 4 + len(generate.aspect_ratios))]
    return generate(images, maps)[0]


@pytest.mark.parametrize("name", OWN)
def test_the_sizes_and_ratios_that_torchvision_has_give_its_own_anchors(name, monkeypatch):
    with torch.device("meta"):
        model, given = ours(name), ours(name, anchor_sizes=OWN[name][0], anchor_ratios=OWN[name][1])
    assert_close(laid(given), laid(model))
    assert shapes(given) == shapes(model)


def test_anchors_are_in_pixels_of_the_image_as_the_model_takes_it():
    sizes = [10, 20, 30, 40, 50, 60, 70]
    with torch.device("meta"):
        ssd = ours(SSDLITE, image_size=100, anchor_sizes=sizes)
        retinanet = ours(RETINANET, anchor_sizes=[10, 20, 40, 80, 160])
    first, *_ = generator(ssd)._wh_pairs
    assert_close(first[0] * 100, torch.tensor([10.0, 10.0]))
    assert generator(retinanet).sizes[:2] == ((10, 12, 15), (20, 25, 31))


@pytest.mark.usefixtures("meta")
def test_of_ssd_at_another_size_the_maps_tell_where_the_anchors_lie():
    assert generator(ours(SSD)).steps == [8, 16, 32, 64, 100, 300]
    assert generator(ours(SSD, image_size=512)).steps is None
    assert generator(ours(SSD, image_size=512)).scales == generator(theirs(SSD)).scales


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize(
    "name", ["retinanet_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2"]
)
def test_a_new_head_is_of_the_kind_that_the_old_one_was(name):
    model, want = ours(name, anchor_ratios=[1]), shapes(theirs(name))
    assert shapes(model).keys() == want.keys()
    others = {key for key, shape in shapes(model).items() if shape != want[key]}
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in others} == {
        "cls_logits", "bbox_reg" if "retina" in name else "bbox_pred",
    }  # fmt: skip
    if "retina" in name:
        assert model.head.regression_head._loss_type == "giou"


WRONG = {
    "keypoints": ("keypointrcnn_resnet50_fpn", {}, "wants keypoints, which no data here has; near it: fasterrcnn_res"),
    "near": ("ssdlite_mobilenet_v3_large", {}, "no such model; near it: ssdlite320_mobilenet_v3_large"),
    "ssd-sizes": (SSDLITE, {"anchor_sizes": [1, 2]}, "has 6 feature maps, and takes 7 sizes: one of each, and one beh"),
    "levels": (RETINANET, {"anchor_sizes": [1, 2]}, "has 5 levels, and takes 5 sizes, one of each"),
    "rcnn-levels": (RCNN, {"anchor_sizes": [1]}, "has 5 levels, and takes 5 sizes"),
    "fcos": (FCOS, {"anchor_ratios": [1]}, "FCOS has no anchors, but a point for each pixel of its maps; leave both"),
    "small": (SSD, {"image_size": 100}, "model.image_size=100: nothing is left of such an image for the last maps"),
    "classifier": ("resnet8", {"image_size": 64}, "model.image_size=64 with model.name=resnet8: only detectors"),
    "own": (f"{__name__}:Own", {"anchor_ratios": [1.0]}, "model.anchor_ratios=[1.0] with model.name="),
    "segmenter": ("unet", {"anchor_sizes": [1]}, "model.anchor_sizes=[1] with model.name=unet: only detectors"),
    "option": (RCNN, {"options": {"widht": 4}}, f"({RCNN} takes no 'widht', but min_size, max_size"),
    "frozen-layers": (SSDLITE, {"options": {"trainable_backbone_layers": 3}}, "takes no 'trainable_backbone_layers'"),
    "fetched": (SSDLITE, {"options": {"weights": "DEFAULT"}}, "takes no 'weights' here"),
    "negative": (SSDLITE, {"image_size": -1}, "model.image_size=-1: give a side in pixels, or 0 for the model's own"),
    "zero": (SSDLITE, {"anchor_sizes": [0] * 7}, "give numbers above 0"),
}  # fmt: skip


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize(("name", "keys", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_built_is_told_in_one_line(name, keys, said):
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        ours(name, **keys)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("meta")
def test_options_reach_the_model():
    assert ours(SSDLITE, options={"score_thresh": 0.3}).score_thresh == 0.3
    assert ours(RCNN, options={"min_size": 400, "box_score_thresh": 0.3}).transform.min_size == (400,)


class Own(nn.Module):
    """A user's detector, with norms as torchvision's have them."""

    def __init__(self, num_classes, eps=0.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = self.again = FrozenBatchNorm2d(4, eps=eps)
        self.norm.running_mean.fill_(2)


def kept(tmp_path, state):
    torch.save(state, tmp_path / "weights.pt")
    return str(tmp_path / "weights.pt")


@pytest.fixture
def store(monkeypatch):
    """torchvision's store of weights, with a state in it for all names."""

    def put(state):
        monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: dict(state))

    return put


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("name", NAMES)
def test_norms_are_frozen_where_torchvision_freezes_them(name, store):
    store(theirs(name, 91).state_dict())
    want = batch_norms(theirs(name, 91, weights="COCO_V1"))
    assert any(kind is FrozenBatchNorm2d for _, kind, _ in want) == (name in backbones.FROZEN)
    assert batch_norms(ours(name, 91, weights="COCO_V1")) == want
    live = batch_norms(ours(name, 91, weights="COCO_V1", unfreeze_norms=True))
    assert live == batch_norms(theirs(name, 91))


@pytest.mark.usefixtures("meta")
def test_norms_are_frozen_where_torchvision_freezes_them_with_a_classifiers_weights(store):
    store(torchvision.models.resnet50().state_dict())
    want = batch_norms(theirs(RETINANET, weights_backbone="DEFAULT"))
    assert {(kind, eps) for _, kind, eps in want} == {(FrozenBatchNorm2d, 1e-5)}
    assert batch_norms(ours(RETINANET, backbone_weights="DEFAULT")) == want


@pytest.fixture(scope="module")
def trained():
    """The small Faster R-CNN with statistics that something has moved."""
    torch.manual_seed(1)
    state = theirs(SMALL_RCNN, 91).state_dict()
    return {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in state.items()}


@pytest.mark.parametrize("unfrozen", [False, True])
def test_frozen_norms_and_those_made_live_have_the_weights_that_were_loaded(tmp_path, trained, unfrozen):
    model = ours(SMALL_RCNN, weights=kept(tmp_path, trained), unfreeze_norms=unfrozen)
    state = model.state_dict()
    differs = {key for key in state if state[key].shape != trained[key].shape}
    assert len(differs) == 4
    assert all(torch.equal(state[key], trained[key]) for key in state.keys() - differs)
    if not unfrozen:
        assert all(name.partition(".")[0] == "backbone" for name, *_ in batch_norms(model))
    model, converted = norms.convert(model, NormConfig("sync"), Place(torch.device("cpu")))
    assert converted[:2] == ((46 if unfrozen else 0), 46)
    if not unfrozen:
        assert norms.nothing_converted(model).endswith("are converted; model.unfreeze_norms=true makes them live")


def test_norms_that_a_users_builder_froze_are_made_live_in_every_place():
    frozen, live = (ours(f"{__name__}:Own", unfreeze_norms=unfrozen) for unfrozen in (False, True))
    assert type(frozen.norm) is FrozenBatchNorm2d
    assert type(live.norm) is nn.BatchNorm2d
    assert live.again is live.norm
    assert live.norm.eps == 1e-5  # an eps of 0 would divide by the variance of a channel that is the same everywhere
    assert all(torch.equal(getattr(live.norm, name), getattr(frozen.norm, name)) for name in backbones.TENSORS)
    assert [p.requires_grad for p in live.norm.parameters()] == [True, True]


def test_a_checkpoint_fits_a_model_without_the_weights_that_its_run_began_with(tmp_path, trained):
    config = ModelConfig(SMALL_RCNN, weights=kept(tmp_path, trained))
    state = models.build(config, 4).state_dict()
    Path(config.weights).unlink()
    blank = models.build_blank(config, 4)
    models.load_all(blank, state, config.name, tmp_path)
    assert blank.state_dict().keys() == state.keys()


OTHER_CLASSES = {SSDLITE: 12, SSD: 12, RETINANET: 2, FCOS: 2, RCNN: 4, "maskrcnn_resnet50_fpn": 6}


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("name", OTHER_CLASSES)
def test_heads_of_other_classes_keep_their_start_and_nothing_else(name, store):
    store(theirs(name, 91).state_dict())
    said = []
    models.build(ModelConfig(name, weights="DEFAULT", unfreeze_norms=True), 4, said.append)
    all_of_it, left = len(shapes(theirs(name))), OTHER_CLASSES[name]
    assert said[0].startswith(f"loaded {all_of_it - left} of {all_of_it} tensors from DEFAULT (left: ")


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head.regression_head.module_list.0.1.weight": (48, 672, 1, 1)}, "name the model that was trained"),
        ({"head.classification_head.module_list.0.1.weight": (91 * 3, 672, 1, 1)}, "[24, 672, 1, 1] is [273, 672, 1, "),
        ({"backbone.extra.3.2.1.weight": (77,)}, "[128] is [77] there"),
    ],
    ids=["boxes", "anchors", "elsewhere"],
)
def test_heads_of_other_anchors_are_refused(change, said, store):
    state = theirs(SSDLITE, 91).state_dict()
    store({**state, **{key: torch.zeros(shape) for key, shape in change.items()}})
    with pytest.raises(UserError, match=re.escape(said)):
        ours(SSDLITE, weights="DEFAULT")


def former(key):
    """A tensor's name in the files that torchvision has had since 2019 and 2020."""
    key = re.sub(r"^rpn\.head\.conv\.0\.0", "rpn.head.conv", key)
    key = re.sub(r"mask_head\.(\d)\.0", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}", key)
    return re.sub(r"(^head\..*head\.conv)\.(\d)\.0", lambda m: f"{m[1]}.{2 * int(m[2])}", key)


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize(("name", "renamed"), [("maskrcnn_resnet50_fpn", 10), (RETINANET, 16)])
def test_files_with_the_names_of_torchvisions_first_versions_are_understood(name, renamed, store):
    state = theirs(name, 91).state_dict()
    old = {former(key): tensor for key, tensor in state.items()}
    assert len(old.keys() - state.keys()) == renamed
    theirs(name, 91).load_state_dict(old)  # torchvision reads them, so the names are right
    store(old)
    said = []
    models.build(ModelConfig(name, weights="DEFAULT", unfreeze_norms=True), 91, said.append)
    assert said == [f"loaded {len(state)} of {len(state)} tensors from DEFAULT"]


CLASSIFIERS = {
    SSDLITE: "mobilenet_v3_large",
    SSD: "vgg16",
    SMALL_RCNN: "mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_fpn": "mobilenet_v3_large",
    **{name: "resnet50" for name in NAMES if "resnet50" in name},
}


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_has_all_that_its_classifier_has_under_its_names(name, monkeypatch):
    classifier = torchvision.models.get_model_builder(CLASSIFIERS[name])()
    asked = []
    monkeypatch.setattr(
        "torchvision.models._api.WeightsEnum.get_state_dict",
        lambda self, **_: asked.append(str(self)) or classifier.state_dict(),
    )
    said = []
    model = models.build(ModelConfig(name, backbone_weights="DEFAULT", unfreeze_norms=True), 4, said.append)
    part = backbones.classifier_part(model.backbone)
    tensors = len(part.state_dict())
    features = getattr(classifier, "features", classifier)
    assert tensors == len([key for key in features.state_dict() if not key.startswith("fc.")])
    assert said == [f"loaded {tensors} of {tensors} tensors from DEFAULT"]
    assert asked[0].endswith("IMAGENET1K_FEATURES") == (name == SSD)  # of VGG's, those for SSD's mean and std
    assert asked[0].split("_Weights")[0].replace("_", "").lower() == CLASSIFIERS[name].replace("_", "")


def test_ssdlite_starts_from_a_classifier_as_torchvisions_does(tmp_path, store):
    torch.manual_seed(3)
    classifier = torchvision.models.mobilenet_v3_large().state_dict()
    store(classifier)
    want = theirs(SSDLITE, weights_backbone="DEFAULT")
    model = ours(SSDLITE, backbone_weights=kept(tmp_path, {f"module.{k}": v for k, v in classifier.items()}))
    assert shapes(model) == shapes(want)
    assert batch_norms(model) == batch_norms(want)
    state, reference = model.backbone.state_dict(), want.backbone.state_dict()
    features = [key for key in state if key.startswith("features.")]
    assert len(features) == len([key for key in classifier if key.startswith("features.")])
    assert all(torch.equal(state[key], reference[key]) for key in features)


def test_a_backbone_of_another_kind_is_refused_in_one_line(tmp_path):
    path = kept(tmp_path, torchvision.models.resnet18().state_dict())
    with pytest.raises(UserError, match=rf"has 0 of the \d+ tensors of the backbone of model.name={SSDLITE}"):
        ours(SSDLITE, backbone_weights=path)


@pytest.mark.usefixtures("meta")
def test_a_card_tells_what_a_detector_makes_of_its_images():
    card = models.card(ours(SSDLITE, image_size=200, anchor_ratios=[2]))
    assert card["size"] == {"height": 200, "width": 200}
    assert card["mean"] == [0.5] * 3
    assert card["anchors"]["aspect_ratios"] == [[2]] * 6
    assert (card["score_thresh"], card["scores"].split()[-1]) == (0.001, "classes")
    card = models.card(ours(SMALL_RCNN, image_size=64))
    assert card["size"] == {"shorter_side": 64, "longest_side": 107}
    assert (card["score_thresh"], card["nms_thresh"], card["detections_per_img"]) == (0.05, 0.5, 100)
    assert models.card(ours(RETINANET))["scores"] == "sigmoid of the box's class"
    assert models.card(ours(f"{__name__}:Own")) == {}


def test_a_classifiers_name_is_found_in_a_detectors():
    assert {name: re.sub(weights.AROUND, "", name) for name in NAMES} == CLASSIFIERS
