"""Small folders of real image files for the data tests."""

from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image


def write_image(path: Path, index: int, size: int = 8) -> None:
    """A file whose pixels tell its index; JPEG or PNG by its ending."""
    generator = torch.Generator().manual_seed(index)
    pixels = torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(pixels).save(path)


def image_folder(root: Path, train: dict[str, int], test: dict[str, int], size: int = 8) -> Path:
    """root/train/<class>/N.jpg and root/test/<class>/N.jpg, so many of each class."""
    for part, classes in (("train", train), ("test", test)):
        for name, count in classes.items():
            for index in range(count):
                write_image(root / part / name / f"{index:04}.jpg", index, size)
    return root
