"""Semantic segmentation: a class for each pixel, judged by the mean intersection over union."""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from syncbn.trainer.data import Batch
from syncbn.trainer.errors import UserError
from syncbn.trainer.runs.metric import Metric
from syncbn.trainer.tasks.classify import find_scores
from syncbn.trainer.tasks.task import Loss, Picture, Sums, Task

IGNORED = 255  # in a mask: counts for nothing, neither in the loss nor in a figure
# A colour for each class, of which neighbours differ in hue and in brightness; after the last they begin anew
PALETTE = (
    (38, 38, 46), (230, 75, 53), (77, 187, 213), (0, 160, 135), (243, 155, 127), (60, 84, 136), (145, 209, 194),
    (220, 0, 0), (126, 97, 72), (176, 156, 133), (250, 200, 40), (132, 80, 180), (90, 200, 80),
)  # fmt: skip
GREY = (128, 128, 128)  # what is ignored


class Segment(Task):
    """Cross-entropy over the pixels of all ranks that count; figures from one matrix [truth, prediction] of pixels.

    classes: by name, in the order of the masks' numbers.

    Source: mean IoU as Everingham et al. 2010 (Pascal VOC) and Cordts et al. 2016 (Cityscapes) have it: over the
    classes that the eval data has, each pixel counted once.
    """

    weighs = "values"
    targets = "masks"

    def __init__(self, classes: Sequence[str] | None = None, label_smoothing: float = 0.0):
        self.classes, self.label_smoothing = classes or (), label_smoothing
        self.outputs = len(self.classes) or None
        self.metrics = (
            Metric("miou", "%", headline=True),
            Metric("pixel_accuracy", "%"),
            Metric("loss", better="less"),
            *(Metric(f"iou_{name}", "%", detail=True) for name in self.classes),
        )
        self.shapes = {"loss": (), "pixels": (), "matrix": (len(self.classes),) * 2}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        output = model(batch.images)
        scores = self._scores(output, batch.images)
        total = self._cross_entropy(scores, batch.labels)
        sums = self._sums(scores, batch.labels, total)
        return Loss(total, sums["pixels"], sums)

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        parts = []
        for images, masks in alike(batch):
            scores = self._scores(model(images), images)
            # In float64, so that the total is the same for any share of the images
            parts.append(self._sums(scores, masks, self._cross_entropy(scores.double(), masks)))
        zeros = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
        return {name: sum((part[name] for part in parts), zero) if parts else zero for name, zero in zeros.items()}

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        matrix, pixels = sums["matrix"], sums["pixels"].clamp(min=1)
        truth, taken, right = matrix.sum(1), matrix.sum(0), matrix.diagonal()
        ious = {
            name: float(right[i] / (truth[i] + taken[i] - right[i]))
            for i, name in enumerate(self.classes)
            if truth[i] > 0
        }
        return {
            "miou": sum(ious.values()) / max(1, len(ious)),
            "pixel_accuracy": float(right.sum() / pixels),
            "loss": float(sums["loss"] / pixels),
            **{f"iou_{name}": iou for name, iou in ious.items()},
        }

    def pictures(self, model: nn.Module, batch: Batch, pixels: Any) -> list[Picture]:
        pictures = [Picture(self._legend(), ", ".join(f"{i} {name}" for i, name in enumerate(self.classes)))]
        for image, mask, shown in zip(batch.images, batch.labels, pixels, strict=True):
            guess = self._scores(model(image[None]), image[None])[0].argmax(0)
            counts = mask != IGNORED
            right = float((guess == mask)[counts].double().mean()) if counts.any() else 0.0
            panels = [shown, self._coloured(mask), self._coloured(guess)]
            caption = f"image, truth, prediction: {right:.0%} of the pixels"
            pictures.append(Picture(beside(panels), caption))
        return pictures

    def _scores(self, output: Any, images: Tensor) -> Tensor:
        """Scores [B, K, H, W] at the size of the images, in float32 at least."""
        scores = find_scores(output)
        if scores is None or scores.ndim != 4 or scores.shape[1] != len(self.classes):
            given = type(output).__name__ if scores is None else f"scores {[*scores.shape]}"
            raise UserError(
                f"the model gives {given} for images {[*images.shape]}: its forward must return scores "
                f"[{len(images)}, {len(self.classes)}, H, W], by themselves or named out, as those of "
                "torchvision.models.segmentation; model.name=unet is one",
                on_every_rank=True,
            )
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        size = images.shape[-2:]
        return scores if scores.shape[-2:] == size else F.interpolate(scores, size, mode="bilinear")

    def _cross_entropy(self, scores: Tensor, masks: Tensor) -> Tensor:
        return F.cross_entropy(
            scores, masks.long(), ignore_index=IGNORED, reduction="sum", label_smoothing=self.label_smoothing
        )

    def _sums(self, scores: Tensor, masks: Tensor, loss: Tensor) -> Sums:
        classes = len(self.classes)
        counts = masks != IGNORED
        # Pixels that do not count lie behind the matrix, and are cut off: nothing is read back from the device
        places = torch.where(counts, masks.long() * classes + scores.detach().argmax(1), classes**2).flatten()
        ones = torch.ones_like(places, dtype=torch.float64)
        matrix = ones.new_zeros(classes**2 + 1).index_add_(0, places, ones)[:-1].view(classes, classes)
        return {"loss": loss.detach().double(), "pixels": counts.sum(), "matrix": matrix}

    def _coloured(self, mask: Tensor) -> Tensor:
        """uint8 [3, H, W] of classes [H, W]."""
        colours = torch.tensor([*islice(cycle(PALETTE), len(self.classes))], dtype=torch.uint8)
        colours = torch.cat([colours, colours.new_tensor(GREY).expand(256 - len(colours), 3)])
        return colours[mask.long().cpu()].permute(2, 0, 1)

    def _legend(self, side: int = 16) -> Tensor:
        """A square of each class's colour, in their order."""
        return self._coloured(torch.arange(len(self.classes)).repeat_interleave(side).expand(side, -1))


def alike(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """The images and masks of a batch as tensors: one of each, or image by image where each has its own size."""
    if isinstance(batch.images, Tensor):
        return [(batch.images, batch.labels)]
    return [(image[None], mask[None]) for image, mask in zip(batch.images, batch.labels, strict=True)]


def beside(panels: Sequence[Tensor], gap: int = 2) -> Tensor:
    """Pictures [3, H, W] next to each other, with white between them."""
    white = torch.full((3, panels[0].shape[1], gap), 255, dtype=torch.uint8)
    return torch.cat([each for panel in panels for each in (panel, white)][:-1], 2)
