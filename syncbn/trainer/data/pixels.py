"""An image file as three colours of 8 bits, whatever its pixels are.

Pillow is imported where it is used, as the process that starts the ranks has no use for it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


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
