"""The pictures of an evaluation as W&B takes them, with boxes that it can show, hide and filter."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from syncbn.trainer.runs.pictures import PNG, Box, Boxes, Pictures


def images_of(pictures: Pictures) -> list[Any]:
    """A wandb.Image of each picture."""
    import wandb

    captions = [": ".join(filter(None, [" · ".join(png.panels), png.caption])) for png in pictures.each]
    names = _names(pictures)
    return [
        wandb.Image(image, caption=caption, boxes=_boxes(png.boxes, names, (png.width, png.height)))
        for image, caption, png in zip(_of_one_size(pictures.each), captions, pictures.each, strict=True)
    ]


def _names(pictures: Pictures) -> list[str]:
    """Of what boxes hold, in the order of the numbers that W&B is to know them by, the same in all pictures."""
    boxes = [box for png in pictures.each for each in png.boxes.values() for box in each]
    return [*dict.fromkeys([*pictures.legend, *sorted({box.name for box in boxes})])]


def _boxes(boxes: Boxes, names: Sequence[str], size: tuple[int, int]) -> dict[str, Any] | None:
    """The boxes of a picture as W&B takes them; None: it has none. size: its width and height."""
    numbers, labels = {name: i for i, name in enumerate(names)}, dict(enumerate(names))

    def as_data(box: Box) -> dict[str, Any]:
        # Whole pixels within the picture, as W&B wants them
        left, right = (min(max(round(side), 0), size[0]) for side in (box.left, box.right))
        top, bottom = (min(max(round(side), 0), size[1]) for side in (box.top, box.bottom))
        data = {
            "position": {"minX": left, "maxX": right, "minY": top, "maxY": bottom},
            "domain": "pixel",
            "class_id": numbers[box.name],
            "box_caption": box.name if box.score is None else f"{box.name} {box.score:.0%}",
        }
        return data if box.score is None else {**data, "scores": {"score": box.score}}

    return {name: {"box_data": [*map(as_data, each)], "class_labels": labels} for name, each in boxes.items()} or None


def _of_one_size(pngs: Sequence[PNG]) -> list[Any]:
    """The pictures on white as large as the largest: W&B wants all that stand together to be of one size.

    Each keeps its pixels' places, so that boxes stay right.
    """
    from PIL import Image

    images = [Image.open(BytesIO(png.data)) for png in pngs]
    size = max(image.width for image in images), max(image.height for image in images)
    canvases = [Image.new("RGB", size, "white") for _ in images]
    for canvas, image in zip(canvases, images, strict=True):
        canvas.paste(image)
    return canvases
