"""Where images come from, by what they come with: each source is a pair (train, eval) of uint8 images with targets."""

import gzip
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from syncbn.trainer.data.sets import archives, coco, folders, masks, voc
from syncbn.trainer.data.sets.images import Fake, Images, InMemory
from syncbn.trainer.data.sets.scenes import BoxedScenes, Scenes
from syncbn.trainer.errors import UserError

if TYPE_CHECKING:
    from syncbn.trainer.data import DataConfig


def digits(config: "DataConfig") -> tuple[InMemory, InMemory]:
    """The UCI optical digits of digits.md, pixels 0..16 stretched to 0..255."""
    text = gzip.decompress((resources.files("syncbn.trainer.data.sets") / "digits.csv.gz").read_bytes()).decode()
    table = torch.tensor([[int(v) for v in line.split(",")] for line in text.splitlines()])
    images = (table[:, :-1] * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    for_eval = torch.arange(len(table)) % 5 == 0
    classes = [str(d) for d in range(10)]
    train, test = (InMemory(images[part], table[part, -1].tolist(), classes) for part in (~for_eval, for_eval))
    return train, test


def image_folder(config: "DataConfig") -> tuple[Images, Images]:
    """root/train/<class>/*.jpg and root/test/<class>/*.jpg (or root/val): classes are train's, in order of name."""
    return folders.train_and_eval(Path(config.root))


def no_image_folder(config: "DataConfig") -> None:
    if not (Path(config.root) / "train").is_dir():
        folders.train_and_eval(Path(config.root))  # which says so


def fake(config: "DataConfig") -> tuple[Images, Images]:
    """Noise with random labels: for trying a cluster or measuring speed without any data."""
    from torchvision import datasets

    size = (3, config.size or 32, config.size or 32)
    classes = [str(c) for c in range(config.fake_classes)]
    train, test = (
        Fake(datasets.FakeData(n, size, config.fake_classes, random_offset=offset), classes)
        for n, offset in ((config.fake_samples, 0), (max(1, config.fake_samples // 5), config.fake_samples))
    )
    return train, test


def digit_scenes(config: "DataConfig", kind: Callable[..., Scenes] = Scenes) -> tuple[Scenes, Scenes]:
    """Scenes of the digits' training scans, and a quarter as many of their eval scans."""
    train, test = digits(config)
    return (
        kind(train.images, train.labels, config.scenes, seed=0),
        kind(test.images, test.labels, max(1, config.scenes // 4), seed=1),
    )


def mask_folder(config: "DataConfig") -> tuple[Images, Images]:
    """root/train/images/*.jpg and train/masks/*.png, test/ or val/ like it, and root/classes.txt."""
    train, test = masks.train_and_eval(Path(config.root), config.ignore_index)
    return train.checked(), test.checked()


def no_mask_folder(config: "DataConfig") -> None:
    masks.train_and_eval(Path(config.root), config.ignore_index)


class Source(NamedTuple):
    """build: of the config, the images to train on and those for evaluation.

    refuse: raises UserError for what is not there, at once and without torchvision: no image or mask is looked at.
    """

    build: Callable[["DataConfig"], tuple[Images, Images]]
    refuse: Callable[["DataConfig"], object] = lambda config: None


# By what images come with, and by name. torchvision is imported where it is used: it takes seconds, and the process
# that starts the ranks has no use for it
SOURCES: dict[str, dict[str, Source]] = {
    "classes": {
        "digits": Source(digits),
        **{
            source: Source(archives.from_archive(name), archives.no_folder_of(name))
            for source, name in archives.ARCHIVES.items()
        },
        "imagenet": Source(archives.imagenet, archives.unless_folder(archives.no_imagenet)),
        "image_folder": Source(image_folder, no_image_folder),
        "fake": Source(fake),
    },
    "masks": {
        "digit_scenes": Source(digit_scenes),
        "mask_folder": Source(mask_folder, no_mask_folder),
        "voc_segmentation": Source(archives.voc_segmentation, archives.no_folder_of("VOCSegmentation")),
        "cityscapes": Source(archives.cityscapes, archives.unless_folder(archives.no_cityscapes)),
    },
    "boxes": {
        "digit_scenes": Source(partial(digit_scenes, kind=BoxedScenes)),
        "voc_detection": Source(voc.voc_detection, voc.no_voc),
        "coco_detection": Source(coco.coco_detection, coco.no_coco),
    },
    "instances": {
        "digit_scenes": Source(partial(digit_scenes, kind=partial(BoxedScenes, instances=True))),
        "coco_detection": Source(partial(coco.coco_detection, instances=True), coco.no_coco),
    },
}
TARGETS = SOURCES.keys()
NAMES = tuple(dict.fromkeys(name for sources in SOURCES.values() for name in sources))


def source_of(config: "DataConfig", targets: str) -> Source:
    """Raises UserError if the images of data.name come without the targets."""
    if config.name not in SOURCES[targets]:
        raise UserError(
            f"data.name={config.name} has no {targets}, which the task learns from: choose one of "
            f"{', '.join(SOURCES[targets])}"
        )
    return SOURCES[targets][config.name]


def refuse_missing(config: "DataConfig", targets: str = "classes") -> None:
    """Raise UserError if the images come without the targets, or if data.root is not there."""
    source_of(config, targets).refuse(config)
