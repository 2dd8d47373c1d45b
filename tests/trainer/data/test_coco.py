"""Boxes in COCO's layout: what is read, and one line, with file and id, for each thing that is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from syncbn.trainer.data import DataConfig
from syncbn.trainer.data.sets.sources import SOURCES, refuse_missing
from syncbn.trainer.errors import UserError
from tests.trainer.detection import coco

TRAIN = "annotations/instances_train2017.json"
VAL = "annotations/instances_val2017.json"


def config_of(root: Path, **options) -> DataConfig:
    return DataConfig(**{"name": "coco_detection", "root": str(root), "batch_per_rank": 1, **options})


def built_of(root: Path, targets: str = "boxes", **options):
    return SOURCES[targets]["coco_detection"].build(config_of(root, **options))


def changed(change: Callable[[Any], object], file: str = TRAIN) -> Callable[[Path], object]:
    """What a file holds, changed."""

    def spoil(root: Path) -> None:
        held = json.loads((root / file).read_text())
        change(held)
        (root / file).write_text(json.dumps(held))

    return spoil


def of_first(list_name: str, **values: object) -> Callable[[Path], object]:
    return changed(lambda held: held[list_name][0].update(values))


def lacking(list_name: str, key: str) -> Callable[[Path], object]:
    return changed(lambda held: held[list_name][0].pop(key))


@pytest.mark.parametrize("year", ["2017", ""])
def test_labels_follow_the_ids_of_categories_and_areas_are_the_files(tmp_path, year):
    train, test = built_of(coco(tmp_path, year=year))
    assert (len(train), len(test), [*train.classes], [*train.notes]) == (3, 2, ["cat", "dog"], [])
    image, target = train[0]
    assert (image.shape, train.size(0)) == ((3, 30, 40), (40, 30))
    assert target["boxes"].tolist() == [[0, 0, 40, 30], [5, 6, 7, 8]]
    assert target["labels"].tolist() == [2, 1]
    assert target["areas"].tolist() == [600, 2]
    assert target["crowd"].tolist() == [False, False]
    assert train[2][1]["boxes"].shape == (0, 4), "an image without annotations stays"
    assert test[0][1]["boxes"].tolist() == [[10, 5, 20, 15]]


def test_classes_are_known_by_name_whatever_their_ids_in_the_other_file(tmp_path):
    coco(tmp_path)
    changed(lambda held: [each.update(id=each["id"] * 3) for each in held["categories"]], VAL)(tmp_path)
    changed(lambda held: [each.update(category_id=54) for each in held["annotations"]], VAL)(tmp_path)
    assert built_of(tmp_path)[1][0][1]["labels"].tolist() == [2]


def test_crowds_are_marked_and_areas_may_lack(tmp_path):
    coco(tmp_path)
    of_first("annotations", iscrowd=1)(tmp_path)
    lacking("annotations", "area")(tmp_path)
    target = built_of(tmp_path)[0][0][1]
    assert target["crowd"].tolist() == [True, False]
    assert target["areas"].tolist() == [1200, 2]


def test_images_are_found_in_folders_below(tmp_path):
    coco(tmp_path)
    (tmp_path / "train2017/deep").mkdir()
    (tmp_path / "train2017/a.jpg").rename(tmp_path / "train2017/deep/a.jpg")
    assert built_of(tmp_path)[0].where(0).endswith("train2017/deep/a.jpg")


RUNS = [0, 30, 1170]  # down the first column of 40 that are 30 pixels high
SEGMENTATIONS = {
    "a polygon": [[0, 0, 1, 0, 1, 30, 0, 30]],
    "two polygons": [[0, 0, 1, 0, 1, 10, 0, 10], [0, 10, 1, 10, 1, 30, 0, 30]],
    "run lengths": {"size": [30, 40], "counts": RUNS},
    "packed run lengths": {"size": [30, 40], "counts": "0n0bT1"},
}


@pytest.mark.parametrize("kind", SEGMENTATIONS)
def test_instances_have_their_masks(tmp_path, kind):
    pytest.importorskip("faster_coco_eval")
    coco(tmp_path)
    of_first("annotations", segmentation=SEGMENTATIONS[kind])(tmp_path)
    masks = built_of(tmp_path, "instances")[0][0][1]["masks"]
    assert (masks.shape, masks.dtype) == ((2, 30, 40), torch.uint8)
    want = numpy.zeros((2, 30, 40))
    want[0, :, 0] = 1
    want[1, 6:8, 5:7] = 1
    assert masks.tolist() == want.tolist()
    assert built_of(tmp_path, "instances")[0][2][1]["masks"].shape == (0, 32, 32)


BOX = "{root}/" + TRAIN + ": annotation 7, the box {bbox} of left, top, width and height, "
MEND = ": correct it, or data.skip_broken=true leaves such boxes out"
BROKEN = {
    "no height": ([5, 5, 3, 0.0], "has no area"),
    "a negative width": (
        [5, 5, -3, 4], "ends before it begins: its corners are swapped, or its width or height is below 0",
    ),
    "outside": ([40, 5, 3, 4], "lies outside of its image of 40×30 pixels"),
    "partly outside": ([30, 5, 13, 4], "reaches 3 pixels over the edge of its image of 40×30"),
    "three numbers": ([30, 5, 13], "is not of four numbers"),
    "a word": ([30, 5, 13, "x"], "is not of four numbers"),
    "NaN": ([30, 5, 13, float("nan")], "is not of four numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_box_is_told_or_left_out(tmp_path, case):
    bbox, wrong = BROKEN[case]
    of_first("annotations", bbox=bbox)(coco(tmp_path))
    with pytest.raises(UserError) as raised:
        built_of(tmp_path)
    line = BOX.format(root=tmp_path, bbox=bbox) + wrong
    assert str(raised.value) == line + MEND
    for targets in "boxes", "instances":
        train, _ = built_of(tmp_path, targets, skip_broken=True)
        assert train[0][1]["boxes"].tolist() == [[5, 6, 7, 8]]
        assert train.notes == [f"left out of {tmp_path}: 1 broken boxes (the first: {line})"]


FILE = "{root}/" + TRAIN
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "malformed": (
        lambda root: (root / TRAIN).write_text('{"images": [],\n "annotations": [}'),
        FILE + ", line 2, column 18, is no JSON (Expecting value): is the file cut short? Write or fetch it anew",
    ),
    "no list": (
        changed(lambda held: held.pop("categories")),
        FILE + " has no list 'categories': it is to hold images, annotations and categories",
    ),
    "a list alone": (
        lambda root: (root / TRAIN).write_text("[]"),
        FILE + " has no list 'images': it is to hold images, annotations and categories",
    ),
    "no images": (
        changed(lambda held: held.update(images=[])), FILE + " has no image",
    ),
    "no id": (lacking("images", "id"), FILE + ": images[0] has no id, which is a whole number"),
    "no width": (lacking("images", "width"), FILE + ": image 100 has no width"),
    "no bbox": (lacking("annotations", "bbox"), FILE + ": annotation 7 has no bbox"),
    "no name": (lacking("categories", "name"), FILE + ": category 18 has no name"),
    "a size of 0": (
        of_first("images", height=0),
        FILE + ": image 100 has 40×0 pixels: write its width and height there, as whole numbers",
    ),
    "another size": (
        of_first("images", height=60),
        "{root}/train2017/a.jpg has 40×30 pixels, and image 100 of " + FILE
        + " says 40×60: correct that, as its boxes may be for another size",
    ),
    "an image that is nowhere": (
        of_first("annotations", image_id=5),
        FILE + ": annotation 7 has image_id 5, which is that of no image: correct or remove it",
    ),
    "a category that is nowhere": (
        of_first("annotations", category_id=5),
        FILE + ": annotation 7 has category_id 5, which is that of no category: correct or remove it",
    ),
    "an id of a list": (
        of_first("annotations", image_id=[5]),
        FILE + ": annotation 7 has image_id [5], which is that of no image: correct or remove it",
    ),
    "an image id twice": (
        of_first("images", id=101), FILE + ": the id 101 is that of two images: give each an id of its own",
    ),
    "an annotation id twice": (
        of_first("annotations", id=8), FILE + ": the id 8 is that of two annotations: give each an id of its own",
    ),
    "a category id twice": (
        of_first("categories", id=17), FILE + ": the id 17 is that of two categories: give each an id of its own",
    ),
    "a category name twice": (
        of_first("categories", name="cat"),
        FILE + " has a category of the same name twice: give each a name of its own",
    ),
    "images that are not there": (
        lambda root: [(root / f"train2017/{name}.jpg").unlink() for name in "ab"],
        FILE + ": image 100, a.jpg (and 1 more), is not below {root}/train2017: put it there, or remove it from the "
        "file",
    ),
    "a class that train lacks": (
        changed(lambda held: held["categories"].append({"id": 3, "name": "bird"}), VAL),
        "{root}/" + VAL + " has the class 'bird', which " + FILE
        + " lacks: add it there, or correct or remove it here",
    ),
    "a negative area": (
        of_first("annotations", area=-3), FILE + ": annotation 7 has the area -3: correct it",
    ),
    "no box": (
        changed(lambda held: held.update(annotations=[])),
        FILE + " has no box in any of its 3 images: there is nothing to learn from",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_told_with_its_file_and_id(tmp_path, case):
    spoil, said = REFUSED[case]
    spoil(coco(tmp_path))
    for skip_broken in False, True:
        with pytest.raises(UserError) as raised:
            built_of(tmp_path, skip_broken=skip_broken)
        assert str(raised.value) == said.replace("{root}", str(tmp_path))


NO_SEGMENTATION = {"none": None, "empty": [], "two points": [[1, 2, 3, 4]], "no counts": {"size": [30, 40]}}


@pytest.mark.parametrize("segmentation", NO_SEGMENTATION.values(), ids=NO_SEGMENTATION)
def test_instances_without_a_segmentation_are_refused(tmp_path, segmentation):
    of_first("annotations", segmentation=segmentation)(coco(tmp_path))
    built_of(tmp_path)
    with pytest.raises(UserError) as raised:
        built_of(tmp_path, "instances")
    assert str(raised.value) == (
        f"{tmp_path}/{TRAIN}: annotation 7 has no segmentation, which the task learns from: give polygons of three "
        "points or more, or run lengths with size and counts"
    )


def test_a_segmentation_of_another_size_is_told_when_its_turn_comes(tmp_path):
    pytest.importorskip("faster_coco_eval")
    of_first("annotations", segmentation={"size": [5, 5], "counts": [0, 25]})(coco(tmp_path))
    train, _ = built_of(tmp_path, "instances")
    with pytest.raises(UserError, match=r"image 100 of .* has a segmentation that cannot be drawn"):
        train[0]


def test_a_root_without_the_layout_is_refused_at_the_door(tmp_path):
    with pytest.raises(UserError) as raised:
        refuse_missing(config_of(tmp_path), "boxes")
    assert str(raised.value) == (
        f"data.root={tmp_path} holds no COCO: looked there for train2017/, val2017/, "
        "annotations/instances_train2017.json and instances_val2017.json, or all of that without 2017"
    )
