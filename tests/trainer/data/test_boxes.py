"""Images with boxes on their way to a batch: each box follows its object, and groups of alike shape keep together."""

from collections import Counter
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from syncbn.trainer import data
from syncbn.trainer.data import AugmentConfig, DataConfig
from syncbn.trainer.data.sampler import TrainSampler
from syncbn.trainer.data.sets.sources import SOURCES
from syncbn.trainer.data.transforms import WithBoxes, box_steps
from syncbn.trainer.errors import UserError
from syncbn.trainer.world import World
from tests.trainer.detection import SIZES, coco, voc

CPU = torch.device("cpu")
EVERYTHING = AugmentConfig(flip=True, vertical_flip=True, scale=[0.5, 2.0], photometric=True, iou_crop=True)


def config_of(**options) -> DataConfig:
    return DataConfig(**{"name": "digit_scenes", "scenes": 40, "batch_per_rank": 4, **options})


def built_of(config: DataConfig, rank: int = 0, size: int = 1, targets: str = "boxes", **options) -> data.Data:
    return data.build(config, World(rank, size, CPU), seed=3, targets=targets, stacked=False, **options)


def bounds(mask: torch.Tensor) -> list[int]:
    rows, columns = mask.nonzero().T
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_scenes_have_a_box_and_a_mask_of_each_digit():
    scenes, _ = SOURCES["instances"]["digit_scenes"].build(config_of())
    assert [*scenes.classes] == [*"0123456789"]
    for i in range(40):
        image, target = scenes[i]
        whole = scenes.scene(i).mask
        assert scenes.size(i) == (image.shape[2], image.shape[1])
        assert target["boxes"].tolist() == [bounds(mask) for mask in target["masks"]]
        assert torch.equal((target["masks"] * target["labels"].view(-1, 1, 1)).sum(0), whole)
        assert target["areas"].tolist() == [(r - l) * (b - t) for l, t, r, b in target["boxes"].tolist()]  # noqa: E741
        boxes_alone, _ = SOURCES["boxes"]["digit_scenes"].build(config_of())
        assert "masks" not in boxes_alone[i][1]


# With the side of the crop, and how far a box may be from the bounds of a mask that no crop has cut, in pixels
AUGMENTS: dict[str, tuple[AugmentConfig, int, float]] = {
    "none": (AugmentConfig(), 0, 0),
    "flip": (AugmentConfig(flip=True), 0, 0),
    "vertical flip": (AugmentConfig(vertical_flip=True), 0, 0),
    "photometric": (AugmentConfig(photometric=True), 0, 0),
    "IoU crop": (AugmentConfig(iou_crop=True), 0, 0),
    "crop": (AugmentConfig(), 48, 0),
    "padding": (AugmentConfig(), 128, 0),
    # The mask's pixels are whole, and the box is not
    "scale": (AugmentConfig(scale=[0.5, 2.0]), 0, 2),
    "everything": (EVERYTHING, 80, 2),
}


@pytest.mark.parametrize("case", AUGMENTS)
def test_a_box_follows_its_digit(case):
    augment, size, slack = AUGMENTS[case]
    config = config_of(augment=augment, size=size)
    transform, (scenes, _) = WithBoxes(box_steps(config)), SOURCES["instances"]["digit_scenes"].build(config)
    torch.manual_seed(0)
    crops = augment.iou_crop or size == 48
    whole = cut = 0
    for i in range(len(scenes)):
        image, target = transform(*scenes[i])
        assert type(image) is torch.Tensor
        assert {type(part) for part in target.values()} == {torch.Tensor}
        assert len({len(part) for part in target.values()}) == 1
        height, width = target["masks"].shape[1:]
        assert image.shape == (3, height, width)
        for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
            difference = [inner - outer for inner, outer in zip(bounds(mask), box, strict=True)]
            inside = box[0] > 0 and box[1] > 0 and box[2] < width and box[3] < height
            # Padding may lie between the cut and the edge
            if not crops or (inside and case != "everything"):
                assert max(map(abs, difference)) <= slack
                whole += 1
            else:
                # A cut digit may end before the rest of its box does
                assert min(difference[:2]) >= -slack
                assert max(difference[2:]) <= slack
                cut += 1
    assert whole > 50 or crops
    assert cut > 20 or not crops


@pytest.mark.parametrize(("key", "axis"), [("flip", 2), ("vertical_flip", 1)])
def test_half_of_the_images_are_turned_about_their_axis(key, axis):
    config = config_of(augment=AugmentConfig(**{key: True}))
    transform, (scenes, _) = WithBoxes(box_steps(config)), SOURCES["boxes"]["digit_scenes"].build(config)
    torch.manual_seed(0)
    turned = 0
    for i in range(len(scenes)):
        before, after = scenes[i][0], transform(*scenes[i])[0]
        turned += torch.equal(after, before.flip(axis))
        assert torch.equal(after, before) or torch.equal(after, before.flip(axis))
    assert 10 < turned < 30


def test_areas_follow_the_scale_of_their_image():
    target = {
        "boxes": torch.tensor([[10.0, 20, 30, 60]]),
        "labels": torch.tensor([1]),
        "areas": torch.tensor([500.0]),
        "crowd": torch.tensor([True]),
    }
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)
    config = config_of(augment=AugmentConfig(scale=[0.5, 0.5]))
    image, half = WithBoxes(box_steps(config))(image, target)
    assert image.shape == (3, 50, 100)
    assert (half["boxes"].tolist(), half["areas"].tolist()) == ([[5, 10, 15, 30]], [125])
    assert half["crowd"].tolist() == [True]


def test_objects_that_a_crop_leaves_out_are_removed_with_all_that_is_said_of_them():
    config = config_of(size=32)
    transform, (scenes, _) = WithBoxes(box_steps(config)), SOURCES["instances"]["digit_scenes"].build(config)
    removed = 0
    for i in range(len(scenes)):
        image, before = scenes[i]
        _, after = transform(image, before)
        assert {len(part) for part in after.values()} == {len(after["boxes"])}
        removed += len(before["boxes"]) - len(after["boxes"])
        assert ((after["boxes"][:, 2:] - after["boxes"][:, :2]) >= 1).all()
        assert (after["boxes"] >= 0).all()
        assert (after["boxes"] <= 32).all()
    assert removed > 40


def test_an_image_without_boxes_goes_through_every_augmentation(tmp_path):
    coco(tmp_path, {"a": [("dog", (1, 1, 9, 9))], "c": []}, {"e": []})
    for targets in "boxes", "instances":
        config = config_of(name="coco_detection", root=str(tmp_path), batch_per_rank=2, augment=EVERYTHING)
        built = built_of(config, targets=targets)
        for batch in islice(built.train, 20):
            assert sorted(len(target["boxes"]) for target in batch.labels) in ([0, 0], [0, 1])
        (evaluated,) = built.eval
        assert evaluated.labels[0]["boxes"].shape == (0, 4)


def test_a_batch_is_lists_of_images_in_0_to_1_and_of_targets(tmp_path):
    voc(tmp_path)
    built = built_of(config_of(name="voc_detection", root=str(tmp_path), batch_per_rank=3))
    batch = next(iter(built.train))
    assert {tuple(image.shape[1:]) for image in batch.images} == {SIZES[name][::-1] for name in "abc"}
    assert {image.dtype for image in batch.images} == {torch.float32}
    for place, image, target in zip(batch.places, batch.images, batch.labels, strict=True):
        original, as_read = built.training[place]
        assert_close(image, original / 255)
        assert torch.equal(built.train.pixels(image), original)
        assert all(torch.equal(target[name], as_read[name]) for name in as_read)
    assert {key: part.dtype for key, part in batch.labels[0].items()} == {
        "boxes": torch.float32, "labels": torch.int64, "areas": torch.float32, "crowd": torch.bool,
    }  # fmt: skip


def test_workers_and_a_cache_give_the_same_batches():
    def batches(**options):
        return [*islice(built_of(config_of(augment=EVERYTHING, **options)).train, 12)]

    plain = batches()
    for other in batches(workers=1), batches(cache=True):
        for one, two in zip(plain, other, strict=True):
            assert all(map(torch.equal, one.images, two.images))
            for a, b in zip(one.labels, two.labels, strict=True):
                assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_ranks_share_the_batches_of_one(size, grouped):
    config = config_of(augment=EVERYTHING, group_by_aspect_ratio=grouped)
    whole = [*islice(built_of(config, global_batch=6).train, 8)]
    ranks = [[*islice(built_of(config, rank, size, global_batch=6).train, 8)] for rank in range(size)]
    for step, batch in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert batch.places == tuple(place for share in shares for place in share.places)
        images = [image for share in shares for image in share.images]
        targets = [target for share in shares for target in share.labels]
        assert all(map(torch.equal, batch.images, images))
        for one, two in zip(batch.labels, targets, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)


def test_batches_are_of_wide_or_of_high_images():
    config = config_of(scenes=101, group_by_aspect_ratio=True)
    built = built_of(config)
    of_both = 0
    for batch in islice(built.train, built.steps_per_epoch):
        of_both += len({image.shape[2] >= image.shape[1] for image in batch.images}) > 1
    assert of_both <= 1


GROUPS = st.lists(st.integers(0, 3), min_size=12, max_size=60)


@given(GROUPS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
@settings(derandomize=True, deadline=None)
def test_groups_change_the_order_alone(groups, batch, accumulate, epoch):
    def sampler(**options):
        return TrainSampler(
            len(groups), global_batch=batch, accumulate=accumulate, rank=0, world_size=1, seed=5, **options
        )

    plain, grouped = sampler().order(epoch), sampler(groups=groups).order(epoch)
    assert sorted(plain) == sorted(grouped)
    batches = [grouped[i : i + batch] for i in range(0, len(grouped), batch)]
    mixed = sum(len({groups[sample] for sample in each}) > 1 for each in batches)
    assert mixed < max(2, len({groups[sample] for sample in grouped}))
    assert grouped == sampler(groups=groups).order(epoch)


def test_groups_come_in_another_order_in_each_epoch():
    groups = [i % 2 for i in range(64)]
    sampler = TrainSampler(64, global_batch=4, rank=0, world_size=1, seed=5, groups=groups)
    orders = [sampler.order(epoch) for epoch in range(4)]
    assert all(one != two for one, two in pairwise(orders))
    of_batches = [tuple(groups[order[i]] for i in range(0, 64, 4)) for order in orders]
    assert len({*of_batches}) == 4
    assert all(Counter(each) == {0: 8, 1: 8} for each in of_batches)


NOT_OF_BOXES = {
    "pad": (
        {"augment": AugmentConfig(pad=2)}, "boxes",
        "data.augment.pad=2 is for images with classes, and those of this task come with boxes: leave it out",
    ),
    "mixup": (
        {"augment": AugmentConfig(mixup=0.2)}, "instances",
        "data.augment.mixup=0.2 is for images with classes, and those of this task come with instances: leave it out",
    ),
    "iou_crop": (
        {"augment": AugmentConfig(iou_crop=True)}, "masks",
        "data.augment.iou_crop=True is for images with boxes or instances, and those of this task come with masks: "
        "leave it out",
    ),
    "mean": (
        {"mean": [0.4]}, "boxes",
        "data.mean=[0.4] data.std=[0.25]: images with boxes reach the model in 0..1, as detectors normalise them: "
        "leave both out, or undo those of a file with data.mean=[0.5] data.std=[0.25]",
    ),
    "std": (
        {"std": [0.2]}, "instances",
        "data.mean=[0.5] data.std=[0.2]: images with instances reach the model in 0..1, as detectors normalise them: "
        "leave both out, or undo those of a file with data.mean=[0.5] data.std=[0.25]",
    ),
    "groups of masks": (
        {"group_by_aspect_ratio": True}, "masks",
        "data.group_by_aspect_ratio=true is for images with boxes that keep their own sizes, and these have masks: "
        "leave it out",
    ),
    "groups of crops": (
        {"group_by_aspect_ratio": True, "size": 64}, "boxes",
        "data.group_by_aspect_ratio=true is for images with boxes that keep their own sizes, and data.size=64 gives "
        "all one size: leave it out",
    ),
    "no instances": (
        {"name": "voc_detection"}, "instances",
        "data.name=voc_detection has no instances, which the task learns from: choose one of digit_scenes, "
        "coco_detection",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_OF_BOXES)
def test_keys_that_do_not_fit_the_targets_are_refused(case):
    options, targets, said = NOT_OF_BOXES[case]
    with pytest.raises(UserError) as raised:
        built_of(config_of(**options), targets=targets)
    assert str(raised.value) == said
