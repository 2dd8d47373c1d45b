"""An image file as three colours of 8 bits, whatever its pixels are.

Pillow is imported where it is used, as the process that starts the ranks has no use for it.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from syncbn.trainer.errors import UserError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image


class Unreadable(UserError):
    """A file that cannot be decoded: data.skip_broken leaves its image out."""


def unreadable(where: str, error: Exception) -> Unreadable:
    return Unreadable(
        f"cannot read {where} ({first_line(error)}): "
        "replace or remove it, or data.skip_broken=true leaves such images out"
    )


class Head(NamedTuple):
    """What a file says of its image before its pixels. mode: Pillow's; size: (width, height)."""

    mode: str
    size: tuple[int, int]


def head(path: str) -> Head:
    """Of an image file, without decoding it. Raises what Pillow raises."""
    from PIL import Image

    with Image.open(path) as image:
        return Head(image.mode, image.size)


def read_numbers(path: str) -> tuple[str, Any]:
    """The mode of an image file, Pillow's, and its pixels as they are, a numpy array: of a palette, its indices."""
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        return image.mode, numpy.asarray(image)


def read_image(path: str) -> "Image":
    """An image file, or its first picture, as RGB of 8 bits a colour.

    Pixels of more than 8 bits (16-bit PNG and TIFF, whole numbers of 32 bits, floats) are stretched so that the
    smallest of the image becomes 0 and the largest 255. Transparency is dropped. Raises what Pillow raises, and
    ValueError for a pixel that is not finite.
    """
    from PIL import Image

    with Image.open(path) as image:
        # Pillow's own conversion makes 255 of all that is more
        deep = image.mode[0] in "IF"
        return (Image.fromarray(_stretched(image).numpy()) if deep else image).convert("RGB")


def _stretched(image: "Image") -> Tensor:
    import numpy

    values = torch.from_numpy(numpy.asarray(image).astype("float64"))
    if not values.isfinite().all():
        raise ValueError("a pixel is not a finite number")
    low, high = values.aminmax()
    scaled = (values - low) * (255 / (high - low).clamp(min=torch.finfo(values.dtype).tiny))
    return scaled.round().to(torch.uint8)
