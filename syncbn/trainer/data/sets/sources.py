"""Where images come from: each source is a pair (train, eval) of labelled uint8 images."""

import fcntl
import gzip
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from syncbn.trainer.data.sets import folders, masks, pixels
from syncbn.trainer.data.sets.images import Fake, Images, InMemory, Torchvision
from syncbn.trainer.data.sets.masks import Masks
from syncbn.trainer.data.sets.scenes import Scenes
from syncbn.trainer.errors import UserError, first_line

if TYPE_CHECKING:
    from syncbn.trainer.data import DataConfig


def digits(config: "DataConfig") -> tuple[Images, Images]:
    """The UCI optical digits of digits.md, pixels 0..16 stretched to 0..255."""
    text = gzip.decompress((resources.files("syncbn.trainer.data.sets") / "digits.csv.gz").read_bytes()).decode()
    table = torch.tensor([[int(v) for v in line.split(",")] for line in text.splitlines()])
    images = (table[:, :-1] * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    for_eval = torch.arange(len(table)) % 5 == 0
    classes = [str(d) for d in range(10)]
    train, test = (InMemory(images[part], table[part, -1].tolist(), classes) for part in (~for_eval, for_eval))
    return train, test


def from_archive(name: str) -> Callable[["DataConfig"], tuple[Images, Images]]:
    """A source that torchvision knows as a class with root, train and download."""

    def build(config: "DataConfig") -> tuple[Images, Images]:
        from torchvision import datasets

        dataset = getattr(datasets, name)
        try:
            parts = [dataset(config.root, train=train, download=config.download) for train in (True, False)]
            train, test = (Torchvision(part, part.classes) for part in parts)
            train.check()
            test.check()
        except Exception as error:  # files that are cut short or not what they should be raise many kinds
            raise _no_archive(name, config, first_line(error).partition(" You can use")[0].rstrip(".")) from error
        return train, test

    return build


def _no_archive(name: str, config: "DataConfig", why: str) -> UserError:
    mend = (
        f"remove its files there, so that they are fetched anew over the network, or put {name} there yourself"
        if config.download
        else "point data.root to it, or remove its files there and data.download=true fetches it"
    )
    return UserError(f"data.root={config.root} holds no {name} that can be read ({why}): {mend}")


def imagenet(config: "DataConfig") -> tuple[Images, Images]:
    """ILSVRC 2012 as torchvision lays it out: its archives, or train/ and val/ with meta.bin beside them."""
    from torchvision import datasets

    try:
        parts = [datasets.ImageNet(config.root, split=split, loader=pixels.read_image) for split in ("train", "val")]
    except Exception as error:  # of many kinds; ModuleNotFoundError too, as the archives are read with scipy
        raise _no_imagenet(config, first_line(error)) from error
    train, val = (Torchvision(part, [names[0] for names in part.classes]) for part in parts)
    return train, val


def _no_imagenet(config: "DataConfig", why: str) -> UserError:
    return UserError(
        f"data.root={config.root} holds no ImageNet ({why}): put the ILSVRC2012 archives there, "
        "or take data=image_folder for class folders without them"
    )


def image_folder(config: "DataConfig") -> tuple[Images, Images]:
    """root/train/<class>/*.jpg and root/test/<class>/*.jpg (or root/val): classes are train's, in order of name."""
    return folders.train_and_eval(Path(config.root))


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


def digit_scenes(config: "DataConfig") -> tuple[Images, Images]:
    """Scenes of the digits' training scans, and a quarter as many of their eval scans."""
    train, test = digits(config)
    assert isinstance(train, InMemory)
    assert isinstance(test, InMemory)
    return (
        Scenes(train.images, train.labels, config.scenes, seed=0),
        Scenes(test.images, test.labels, max(1, config.scenes // 4), seed=1),
    )


def mask_folder(config: "DataConfig") -> tuple[Images, Images]:
    """root/train/images/*.jpg and train/masks/*.png, test/ or val/ like it, and root/classes.txt."""
    train, test = masks.train_and_eval(Path(config.root), config.ignore_index)
    return train.checked(), test.checked()


def voc_segmentation(config: "DataConfig") -> tuple[Images, Images]:
    """Pascal VOC 2012 as torchvision lays it out: 1 464 training and 1 449 eval images of 20 classes and background."""
    from torchvision import datasets

    names = dict(enumerate(masks.VOC_CLASSES))
    try:
        if config.download:
            _fetch_voc(Path(config.root))
        parts = [datasets.VOCSegmentation(config.root, image_set=part) for part in ("train", "val")]
        train, val = (
            Masks.of_files(part.root, zip(part.images, part.masks, strict=True), names, {255, config.ignore_index})
            for part in parts
        )
    except Exception as error:
        raise _no_archive("VOCSegmentation", config, first_line(error).partition(" You can use")[0]) from error
    return train.checked(), val.checked()


def _fetch_voc(root: Path) -> None:
    """Unpack its archive, unless that was done: torchvision does so at each call, under the eyes of other ranks."""
    from torchvision import datasets

    root.mkdir(parents=True, exist_ok=True)
    with (root / ".voc.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "VOCdevkit" / "VOC2012").is_dir():
            datasets.VOCSegmentation(root, image_set="train", download=True)


def cityscapes(config: "DataConfig") -> tuple[Images, Images]:
    """Cityscapes' fine annotations as torchvision lays them out: the 19 classes that its benchmark counts."""
    from torchvision import datasets

    labels = datasets.Cityscapes.classes
    names = {label.id: label.name for label in labels if 0 <= label.train_id < 255}
    ignored = {label.id for label in labels if label.train_id == 255} | {config.ignore_index}
    try:
        parts = [datasets.Cityscapes(config.root, split=part, target_type="semantic") for part in ("train", "val")]
        train, val = (
            Masks.of_files(
                part.root,
                sorted((image, mask) for image, (mask,) in zip(part.images, part.targets, strict=True)),
                names,
                ignored,
            )
            for part in parts
        )
    except Exception as error:
        raise _no_cityscapes(config, first_line(error)) from error
    return train.checked(), val.checked()


def _no_cityscapes(config: "DataConfig", why: str) -> UserError:
    return UserError(
        f"data.root={config.root} holds no Cityscapes ({why}): put leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip there, or what they hold"
    )


# By the name of the source, that of torchvision's class
ARCHIVES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}
FETCHED = {**ARCHIVES, "voc_segmentation": "VOCSegmentation"}

# torchvision is imported where it is used: it takes seconds, and the process that starts the ranks has no use for it
SOURCES: dict[str, Callable[["DataConfig"], tuple[Images, Images]]] = {
    "digits": digits,
    **{source: from_archive(name) for source, name in ARCHIVES.items()},
    "imagenet": imagenet,
    "image_folder": image_folder,
    "fake": fake,
    "digit_scenes": digit_scenes,
    "mask_folder": mask_folder,
    "voc_segmentation": voc_segmentation,
    "cityscapes": cityscapes,
}

# What images come with, and the sources that have it
WITH_MASKS = ("digit_scenes", "mask_folder", "voc_segmentation", "cityscapes")
TARGETS = {"classes": tuple(name for name in SOURCES if name not in WITH_MASKS), "masks": WITH_MASKS}


def refuse_missing(config: "DataConfig", targets: str = "classes") -> None:
    """Raise UserError if the images come without the targets, or if data.root is not there.

    At once and without torchvision: no image is looked at, and of those with a mask each the names alone.
    """
    if config.name not in TARGETS[targets]:
        raise UserError(
            f"data.name={config.name} has no {targets}, which the task learns from: choose one of "
            f"{', '.join(TARGETS[targets])}"
        )
    root, none = Path(config.root), "there is no such folder"
    if config.name == "image_folder" and not (root / "train").is_dir():
        folders.train_and_eval(root)  # which says so
    if config.name == "mask_folder":
        masks.train_and_eval(root, config.ignore_index)
    if root.is_dir():
        return
    if config.name in FETCHED and not config.download:
        raise _no_archive(FETCHED[config.name], config, none)
    if config.name == "imagenet":
        raise _no_imagenet(config, none)
    if config.name == "cityscapes":
        raise _no_cityscapes(config, none)
