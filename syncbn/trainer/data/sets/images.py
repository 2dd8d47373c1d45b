"""What images are to the rest of the trainer, the kinds that need no folder of their own, and what tells sets apart."""

import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, Protocol

import torch
from torch import Tensor


class Images(Protocol):
    """Labelled images: classes by name; [i] is (uint8 [1 or 3, H, W], target); where(i) names image i in a message.

    A target is a class; or a mask of classes, uint8 [H, W], in which 255 counts for nothing; or what boxes.with_boxes
    makes, with instances also masks, uint8 [n, H, W]: label k of an object is then classes[k - 1], and images have
    size(i), (width, height) without decoding image i.

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

    def mask(self, index: int) -> Tensor:
        """Of images with masks, without decoding the image where the source can."""
        index = self.kept[index]
        alone = getattr(self.images, "mask", None)
        return alone(index) if alone else self.images[index][1]

    def size(self, index: int) -> tuple[int, int]:
        """Of images with boxes: width and height."""
        return self.images.size(self.kept[index])  # pyright: ignore[reportAttributeAccessIssue]

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


def wide_or_high(images: Any) -> list[int]:
    """Of each image, which has a size(i), 1 if it is wider than high, or as wide."""
    return [int(width >= height) for width, height in map(images.size, range(len(images)))]


def _packed(labels: Sequence[int] | Tensor) -> bytes:
    return torch.as_tensor(labels, dtype=torch.int64).numpy().astype("<i8").tobytes()
