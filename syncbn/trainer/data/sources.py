"""Where images come from: each source is a pair (train, eval) of labelled uint8 images."""

import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from syncbn.trainer.data import pixels
from syncbn.trainer.data.folders import train_and_eval
from syncbn.trainer.data.scenes import Scenes
from syncbn.trainer.errors import UserError, first_line

if TYPE_CHECKING:
    from syncbn.trainer.data import DataConfig


class Images(Protocol):
    """Labelled images: classes by name; [i] is (uint8 [1 or 3, H, W], target); where(i) names image i in a message.

    A target is a class, or a mask of classes, uint8 [H, W], in which 255 counts for nothing.

    fingerprint_parts() tell them from others of the same number and classes, without reading any: labels, file names.
    notes: what of the data set is not among them, for its user to know.
    """

    classes: Sequence[str]

    @property
    def notes(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, Any]: ...
    def where(self, index: int) -> str: ...
    def fingerprint_parts(self) -> Iterator[bytes]: ...


class Torchvision:
    """A torchvision data set as Images."""

    notes: Sequence[str] = ()

    def __init__(self, dataset: Any, classes: Sequence[str], labels: Sequence[int] | None = None):
        self.dataset, self.classes = dataset, classes
        self.labels = labels  # ours for each of the data set's; None: the same

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.transforms.v2 import functional as F

        image, label = self.dataset[index]
        return F.pil_to_tensor(image), int(label) if self.labels is None else self.labels[label]

    def where(self, index: int) -> str:
        files = getattr(self.dataset, "samples", None)
        return files[index][0] if files else f"image {index} of {type(self.dataset).__name__}"

    def check(self) -> None:
        """Raise ValueError if images and labels do not fit together."""
        labels = torch.as_tensor(self.dataset.targets)
        if len(labels) != len(self):
            raise ValueError(f"{len(self)} images and {len(labels)} labels")
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(self.classes):
            raise ValueError(f"labels that are not of its {len(self.classes)} classes")

    def fingerprint_parts(self) -> Iterator[bytes]:
        yield _packed(self.dataset.targets)
        if files := getattr(self.dataset, "samples", None):
            root = str(self.dataset.root)
            names = "\n".join(path.removeprefix(root).lstrip(os.sep) for path, _ in files)
            yield names.replace(os.sep, "/").encode(errors="surrogateescape")


class Fake(Torchvision):
    """Torchvision's noise, whose labels are drawn with the images."""

    def fingerprint_parts(self) -> Iterator[bytes]:
        yield repr((self.dataset.num_classes, self.dataset.image_size, self.dataset.random_offset)).encode()


class InMemory:
    """Images held as one tensor [N, C, H, W]."""

    notes: Sequence[str] = ()

    def __init__(self, images: Tensor, labels: list[int], classes: Sequence[str]):
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]

    def where(self, index: int) -> str:
        return f"image {index}"

    def fingerprint_parts(self) -> Iterator[bytes]:
        yield _packed(self.labels)


class Spread:
    """So many of the images, evenly spread over all of them: in order of class, the same share of each."""

    def __init__(self, images: Images, number: int):
        self.images, self.classes = images, images.classes
        self.kept = [i * len(images) // number for i in range(number)]
        self.notes = images.notes

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.images[self.kept[index]]

    def where(self, index: int) -> str:
        return self.images.where(self.kept[index])

    def fingerprint_parts(self) -> Iterator[bytes]:
        return self.images.fingerprint_parts()


def fingerprint(train: Images, test: Images) -> dict[str, Any]:
    """What the data set holds: {"train": n, "eval": n, "classes": n, "digest": hex}, the same wherever it lies.

    The digest is of the classes, labels and file names, in their order, and not of what the images show.
    """
    digest = blake2b(digest_size=16)
    for part in train, test:
        digest.update(repr((len(part), [*part.classes])).encode())
        for piece in part.fingerprint_parts():
            digest.update(piece)
    return {"train": len(train), "eval": len(test), "classes": len(train.classes), "digest": digest.hexdigest()}


def _packed(labels: Sequence[int] | Tensor) -> bytes:
    return torch.as_tensor(labels, dtype=torch.int64).numpy().astype("<i8").tobytes()


def digits(config: "DataConfig") -> tuple[Images, Images]:
    """The UCI optical digits of digits.md, pixels 0..16 stretched to 0..255."""
    text = gzip.decompress((resources.files("syncbn.trainer.data") / "digits.csv.gz").read_bytes()).decode()
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
    return train_and_eval(Path(config.root))


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


# By the name of the source, that of torchvision's class
ARCHIVES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}

# torchvision is imported where it is used: it takes seconds, and the process that starts the ranks has no use for it
SOURCES: dict[str, Callable[["DataConfig"], tuple[Images, Images]]] = {
    "digits": digits,
    **{source: from_archive(name) for source, name in ARCHIVES.items()},
    "imagenet": imagenet,
    "image_folder": image_folder,
    "fake": fake,
    "digit_scenes": digit_scenes,
}

# What images come with, and the sources that have it
WITH_MASKS = ("digit_scenes",)
TARGETS = {"classes": tuple(name for name in SOURCES if name not in WITH_MASKS), "masks": WITH_MASKS}


def refuse_missing(config: "DataConfig", targets: str = "classes") -> None:
    """Raise UserError if the images come without the targets, or if data.root is not there.

    At once and without torchvision: what lies in it is not looked at.
    """
    if config.name not in TARGETS[targets]:
        raise UserError(
            f"data.name={config.name} has no {targets}, which the task learns from: choose one of "
            f"{', '.join(TARGETS[targets])}"
        )
    root, none = Path(config.root), "there is no such folder"
    if config.name == "image_folder" and not (root / "train").is_dir():
        train_and_eval(root)  # which says so
    if config.name in ARCHIVES and not config.download and not root.is_dir():
        raise _no_archive(ARCHIVES[config.name], config, none)
    if config.name == "imagenet" and not root.is_dir():
        raise _no_imagenet(config, none)
