"""Object detection in COCO's layout: a JSON file of images, categories and annotations for each part.

Source: Lin et al. 2014, cocodataset.org/#format-data.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from syncbn.trainer.data.sets import folders
from syncbn.trainer.data.sets.boxes import Annotated, Annotations, Box, label_of, number, refuse_no_box, size_of
from syncbn.trainer.errors import UserError

if TYPE_CHECKING:
    from syncbn.trainer.data import DataConfig

PARTS = (("train2017", "val2017"), ("train", "val"))  # folders of images, and annotations/instances_<part>.json
NO_BOX = (inf, inf, inf, inf)
LAYOUT = (
    "train2017/, val2017/, annotations/instances_train2017.json and instances_val2017.json, or all of that without 2017"
)


def coco_detection(config: "DataConfig", *, instances: bool = False) -> tuple[Annotated, Annotated]:
    """The images of both parts, no file of which is opened but a few whose size is looked at.

    Label k is the k-th of the training file's categories, in the order of their ids.

    Args:
        instances: whether targets have masks, drawn from the segmentations.
    """
    if instances and find_spec("faster_coco_eval") is None:
        raise UserError(
            "data.name=coco_detection: faster-coco-eval, which draws masks, is not installed: pip install it"
        )
    root, parts = Path(config.root), layout_of(Path(config.root))
    files = [File(root, part) for part in parts]
    classes = [*files[0].categories.values()]
    labels = {name: label for label, name in enumerate(classes, 1)}
    for name in files[1].categories.values():
        label_of(name, labels, str(files[1].path), str(files[0].path))
    train, test = (_annotated(file, labels, config.skip_broken, instances) for file in files)
    refuse_no_box(train, str(files[0].path))
    return train.checked(), test.checked()


def no_coco(config: "DataConfig") -> None:
    """Raise UserError if data.root does not hold the layout."""
    layout_of(Path(config.root))


def layout_of(root: Path) -> tuple[str, str]:
    """The names of the parts to train on and for evaluation."""
    for parts in PARTS:
        if all((root / part).is_dir() and _path(root, part).exists() for part in parts):
            return parts
    raise UserError(f"data.root={root} holds no COCO: looked there for {LAYOUT}")


def _path(root: Path, part: str) -> Path:
    return root / "annotations" / f"instances_{part}.json"


class File:
    """What a file of annotations holds, each thing looked at for what it must have.

    categories: names by id, in the order of the ids. images: by id. annotations: of each image, by its id.
    """

    def __init__(self, root: Path, part: str):
        self.root, self.folder, self.path = root, root / part, _path(root, part)
        held = self._parsed()
        named = self._by_id(held, "categories", "category", ("name",))
        self.categories: Mapping[int, str] = {i: str(named[i]["name"]) for i in sorted(named)}
        if len({*self.categories.values()}) < len(self.categories):
            raise UserError(f"{self.path} has a category of the same name twice: give each a name of its own")
        self.images = self._by_id(held, "images", "image", ("file_name", "width", "height"))
        if not self.images:
            raise UserError(f"{self.path} has no image")
        self.annotations: Mapping[int, list[Any]] = defaultdict(list)
        for i, each in self._by_id(held, "annotations", "annotation", ("image_id", "category_id", "bbox")).items():
            for key, held_ids in ("image_id", self.images), ("category_id", self.categories):
                if not _is_id(each[key]) or each[key] not in held_ids:
                    raise UserError(
                        f"{self.path}: annotation {i} has {key} {each[key]!r}, which is that of no "
                        f"{key.removesuffix('_id')}: correct or remove it"
                    )
            self.annotations[each["image_id"]].append(each)

    def _parsed(self) -> Mapping[str, Any]:
        try:
            with self.path.open("rb") as file:
                held = json.load(file)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror})") from error
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.path}, line {error.lineno}, column {error.colno}, is no JSON ({error.msg}): is the file cut "
                "short? Write or fetch it anew"
            ) from error
        except (UnicodeError, RecursionError) as error:
            raise UserError(f"{self.path} is no JSON ({error}): write or fetch it anew") from error
        for key in "images", "annotations", "categories":
            if not isinstance(held, dict) or not isinstance(held.get(key), list):
                raise UserError(f"{self.path} has no list {key!r}: it is to hold images, annotations and categories")
        return held

    def _by_id(self, held: Mapping[str, Any], key: str, kind: str, keys: Sequence[str]) -> dict[int, Any]:
        """The things of a list by their ids, in its order. keys: what each must have."""
        things = {}
        for place, each in enumerate(held[key]):
            if not isinstance(each, dict) or not _is_id(each.get("id")):
                raise UserError(f"{self.path}: {key}[{place}] has no id, which is a whole number")
            if each["id"] in things:
                raise UserError(f"{self.path}: the id {each['id']} is that of two {key}: give each an id of its own")
            for lacking in keys:
                if each.get(lacking) is None:
                    raise UserError(f"{self.path}: {kind} {each['id']} has no {lacking}")
            things[each["id"]] = each
        return things

    def sized(self) -> Iterator[tuple[Any, str, tuple[int, int]]]:
        """Each image's id, its file, and its width and height."""
        try:
            paths = [*folders.files_below(self.folder, folders.ENDINGS, Counter())]
        except OSError as error:
            raise UserError(f"{self.folder} cannot be read ({error.strerror}: {error.filename})") from error
        by_name = {os.path.basename(path): path for path in paths}
        by_name |= {os.path.relpath(path, self.folder).replace(os.sep, "/"): path for path in paths}
        lacking = [each for each in self.images.values() if str(each["file_name"]) not in by_name]
        if lacking:
            more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            raise UserError(
                f"{self.path}: image {lacking[0]['id']}, {lacking[0]['file_name']}{more}, is not below {self.folder}: "
                "put it there, or remove it from the file"
            )
        for i, each in self.images.items():
            size = size_of(each["width"], each["height"])
            if size is None:
                raise UserError(
                    f"{self.path}: image {i} has {each['width']!r}×{each['height']!r} pixels: write its width and "
                    "height there, as whole numbers"
                )
            yield i, by_name[str(each["file_name"])], size


def _annotated(file: File, labels: Mapping[str, int], skip_broken: bool, instances: bool) -> Annotated:
    annotations = Annotations(skip_broken=skip_broken)
    label_by_id = {i: labels[name] for i, name in file.categories.items()}
    for i, path, size in file.sized():
        annotations.add_image(path, size, f"image {i} of {file.path}")
        for each in file.annotations.get(i, ()):
            area = number(each["area"]) if each.get("area") is not None else None
            if area is not None and not 0 <= area < inf:
                raise UserError(f"{file.path}: annotation {each['id']} has the area {each['area']!r}: correct it")
            annotations.add(
                _box(each["bbox"]),
                label_by_id[each["category_id"]],
                partial(_where, file.path, each),
                area=area,
                crowd=bool(each.get("iscrowd")),
                shape=_shape(file.path, each) if instances else None,
            )
    return Annotated(file.root, annotations, [*labels], drawn if instances else None)


def _where(path: Path, annotation: Mapping[str, Any]) -> str:
    return f"{path}: annotation {annotation['id']}, the box {annotation['bbox']} of left, top, width and height,"


def _box(bbox: Any) -> Box:
    if not isinstance(bbox, list) or len(bbox) != 4:
        return NO_BOX
    left, top, width, height = map(number, bbox)
    return left, top, left + width, top + height


def _shape(path: Path, annotation: Mapping[str, Any]) -> bytes:
    """A segmentation as it is kept until its image is asked for: polygons, or run lengths."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and segmentation:
        fits = all(isinstance(each, list) and len(each) >= 6 and len(each) % 2 == 0 for each in segmentation)
    else:
        fits = isinstance(segmentation, dict) and segmentation.keys() >= {"size", "counts"}
    if fits:
        return json.dumps(segmentation).encode()
    raise UserError(
        f"{path}: annotation {annotation['id']} has no segmentation, which the task learns from: give polygons of "
        "three points or more, or run lengths with size and counts"
    )


def drawn(shapes: Sequence[bytes], size: tuple[int, int]) -> Tensor:
    """Masks uint8 [n, H, W] of segmentations. size: width and height of their image."""
    from faster_coco_eval.core import mask

    width, height = size
    masks = torch.zeros(len(shapes), height, width, dtype=torch.uint8)
    for one, shape in zip(masks, shapes, strict=True):
        runs = json.loads(shape)
        if isinstance(runs, list):
            runs = mask.merge([*mask.frPyObjects(runs, height, width)])
        elif isinstance(runs["counts"], list):
            runs = mask.frPyObjects(runs, height, width)
        else:
            runs["counts"] = runs["counts"].encode()
        one.copy_(torch.from_numpy(mask.decode(runs)))
    return masks


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
