"""Public data sets that torchvision unpacks, reads, or fetches: each a pair (train, eval) of Images."""

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from syncbn.trainer.data.sets import masks, pixels
from syncbn.trainer.data.sets.images import Images, Torchvision
from syncbn.trainer.data.sets.masks import Masks
from syncbn.trainer.errors import UserError, first_line

if TYPE_CHECKING:
    from syncbn.trainer.data import DataConfig

# By the name of the source, that of torchvision's class
ARCHIVES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}
NO_FOLDER = "there is no such folder"


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
            raise no_archive(name, config, first_line(error).partition(" You can use")[0].rstrip(".")) from error
        return train, test

    return build


def no_folder_of(name: str) -> Callable[["DataConfig"], None]:
    """What raises UserError if data.root is not there, and nothing is to be fetched."""

    def refuse(config: "DataConfig") -> None:
        if not config.download and not Path(config.root).is_dir():
            raise no_archive(name, config, NO_FOLDER)

    return refuse


def no_archive(name: str, config: "DataConfig", why: str) -> UserError:
    mend = (
        f"remove its files there, so that they are fetched anew over the network, or put {name} there yourself"
        if config.download
        else "point data.root to it, or remove its files there and data.download=true fetches it"
    )
    return UserError(f"data.root={config.root} holds no {name} that can be read ({why}): {mend}")


def unless_folder(refusal: Callable[["DataConfig", str], UserError]) -> Callable[["DataConfig"], None]:
    """What raises the refusal where data.root is no folder."""

    def refuse(config: "DataConfig") -> None:
        if not Path(config.root).is_dir():
            raise refusal(config, NO_FOLDER)

    return refuse


def imagenet(config: "DataConfig") -> tuple[Images, Images]:
    """ILSVRC 2012 as torchvision lays it out: its archives, or train/ and val/ with meta.bin beside them."""
    from torchvision import datasets

    try:
        parts = [datasets.ImageNet(config.root, split=split, loader=pixels.read_image) for split in ("train", "val")]
    except Exception as error:  # of many kinds; ModuleNotFoundError too, as the archives are read with scipy
        raise no_imagenet(config, first_line(error)) from error
    train, val = (Torchvision(part, [names[0] for names in part.classes]) for part in parts)
    return train, val


def no_imagenet(config: "DataConfig", why: str) -> UserError:
    return UserError(
        f"data.root={config.root} holds no ImageNet ({why}): put the ILSVRC2012 archives there, "
        "or take data=image_folder for class folders without them"
    )


def voc_segmentation(config: "DataConfig") -> tuple[Images, Images]:
    """Pascal VOC 2012 as torchvision lays it out: 1 464 training and 1 449 eval images of 20 classes and background."""
    from torchvision import datasets

    names = dict(enumerate(masks.VOC_CLASSES))
    try:
        if config.download:
            fetch_voc(Path(config.root))
        parts = [datasets.VOCSegmentation(config.root, image_set=part) for part in ("train", "val")]
        train, val = (
            Masks.of_files(part.root, zip(part.images, part.masks, strict=True), names, {255, config.ignore_index})
            for part in parts
        )
    except Exception as error:
        raise no_archive("VOCSegmentation", config, first_line(error).partition(" You can use")[0]) from error
    return train.checked(), val.checked()


def fetch_voc(root: Path) -> None:
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
        raise no_cityscapes(config, first_line(error)) from error
    return train.checked(), val.checked()


def no_cityscapes(config: "DataConfig", why: str) -> UserError:
    return UserError(
        f"data.root={config.root} holds no Cityscapes ({why}): put leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip there, or what they hold"
    )
