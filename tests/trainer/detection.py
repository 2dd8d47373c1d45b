"""Small data sets with boxes in the layouts of Pascal VOC and COCO, for the data tests."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.v2.functional import to_pil_image

Box = tuple[int, int, int, int]  # left, top, right, bottom, the latter two behind the last pixel
Objects = Mapping[str, Sequence[tuple[str, Box]]]  # of each image, by its name

SIZES = {"a": (40, 30), "b": (30, 40), "c": (32, 32), "d": (50, 20), "e": (24, 48)}
TRAIN: Objects = {
    "a": [("dog", (0, 0, 40, 30)), ("cat", (5, 6, 7, 8))],
    "b": [("cat", (3, 4, 30, 40))],
    "c": [],
}
EVAL: Objects = {"d": [("dog", (10, 5, 20, 15))], "e": []}


def write_photo(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    draw = torch.Generator().manual_seed(width)
    to_pil_image(torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=draw)).save(path)


def voc_xml(size: tuple[int, int], objects: Sequence[tuple[str, Box]]) -> str:
    lines = ["<annotation>", "<size>", f"<width>{size[0]}</width>", f"<height>{size[1]}</height>", "</size>"]
    for name, (left, top, right, bottom) in objects:
        sides = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
        bndbox = "".join(f"<{side}>{value}</{side}>" for side, value in sides.items())
        lines += ["<object>", f"<name>{name}</name>", "<difficult>0</difficult>", f"<bndbox>{bndbox}</bndbox>"]
        lines += ["<part>", "<name>head</name>", "</part>", "</object>"]
    return "\n".join([*lines, "</annotation>"])


def voc(root: Path, train: Objects = TRAIN, test: Objects = EVAL, year: str = "2007", lists: str = "val") -> Path:
    """root/VOCdevkit/VOC<year>; returns that folder."""
    folder = root / "VOCdevkit" / f"VOC{year}"
    for name in "Annotations", "ImageSets/Main":
        (folder / name).mkdir(parents=True)
    for part, images in (("train", train), (lists, test)):
        (folder / "ImageSets/Main" / f"{part}.txt").write_text("".join(f"{name}\n" for name in images))
        for name, objects in images.items():
            write_photo(folder / "JPEGImages" / f"{name}.jpg", SIZES[name])
            (folder / "Annotations" / f"{name}.xml").write_text(voc_xml(SIZES[name], objects))
    return folder


IDS = {"dog": 18, "cat": 17}  # with gaps, and not in the order of names


def coco(root: Path, train: Objects = TRAIN, test: Objects = EVAL, year: str = "2017") -> Path:
    """root/train<year>, root/val<year> and root/annotations; returns that folder."""
    for part, images in (("train", train), ("val", test)):
        held: dict[str, Any] = {
            "categories": [{"id": i, "name": name} for name, i in IDS.items()],
            "images": [],
            "annotations": [],
        }
        for number, (name, objects) in enumerate(images.items(), 100):
            write_photo(root / f"{part}{year}" / f"{name}.jpg", SIZES[name])
            width, height = SIZES[name]
            held["images"].append({"id": number, "file_name": f"{name}.jpg", "width": width, "height": height})
            for kind, (left, top, right, bottom) in objects:
                held["annotations"].append(
                    {
                        "id": len(held["annotations"]) + 7,
                        "image_id": number,
                        "category_id": IDS[kind],
                        "bbox": [left, top, right - left, bottom - top],
                        "area": (right - left) * (bottom - top) / 2,
                        "iscrowd": 0,
                        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                    }
                )
        path = root / "annotations" / f"instances_{part}{year}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(held))
    return root
