"""Semantic segmentation: a class for each pixel, judged by the mean intersection over union."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from syncbn.trainer.data import IGNORED, Batch, Data, class_pixels
from syncbn.trainer.errors import UserError
from syncbn.trainer.runs.metric import Metric
from syncbn.trainer.runs.pictures import Matrix
from syncbn.trainer.tasks.classify import find_scores
from syncbn.trainer.tasks.colours import GREY, colour_of, in_hex
from syncbn.trainer.tasks.objective import Objective, rarity
from syncbn.trainer.tasks.task import Loss, Picture, Sums, Task

PANELS = ("image", "truth", "prediction")


class Segment(Task):
    """Cross-entropy over the pixels of all ranks that count; figures from one matrix [truth, prediction] of pixels.

    classes: by name, in the order of the masks' numbers.

    Source: mean IoU as Everingham et al. 2010 (Pascal VOC) and Cordts et al. 2016 (Cityscapes) have it: over the
    classes that the eval data has, each pixel counted once.
    """

    weighs = "values"
    targets = "masks"
    any_size = True

    def __init__(self, classes: Sequence[str] | None = None, objective: Objective | None = None):
        self.classes, self.objective = classes or (), objective or Objective()
        self.outputs = len(self.classes) or None
        self.metrics = (
            Metric("miou", "%", headline=True),
            Metric("pixel_accuracy", "%"),
            Metric("loss", better="less"),
            *(Metric(f"iou_{name}", "%", detail=name) for name in self.classes),
        )
        self.shapes = {"loss": (), "weight": (), "matrix": (len(self.classes),) * 2}
        self.class_weights: Tensor | None = None  # [K]; None: 1 of each

    def prepare(self, data: Data) -> None:
        if self.objective.class_weights == "auto":
            self.class_weights = rarity(class_pixels(data.training)).to(data.train.device)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        output = model(batch.images)
        scores = self._scores(output, batch.images)
        weights = self.objective.pixel_weights(scores, batch.labels, self.class_weights)
        total = self.objective.total(scores, batch.labels, weights)
        if isinstance(output, Mapping) and "aux" in output:  # of a head that helps in training
            auxiliary = self._scores(output["aux"], batch.images)
            # Also at a weight of 0, as DDP wants a gradient of every parameter
            total = total + self.objective.aux_weight * self.objective.total(auxiliary, batch.labels, weights)
        weight = weights.sum(dtype=torch.float64)
        sums = {"loss": total.detach().double(), "weight": weight, "matrix": self._matrix(scores, batch.labels)}
        return Loss(total, weight, sums)

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self.shapes.items()}
        for images, masks in alike(batch):
            scores = self._scores(model(images), images)
            # Each pixel rounded alone and added up in float64: the same total for any share of the images
            losses = F.cross_entropy(scores, masks.long(), ignore_index=IGNORED, reduction="none")
            part = {
                "loss": losses.sum(dtype=torch.float64),
                "weight": (masks != IGNORED).sum(),
                "matrix": self._matrix(scores, masks),
            }
            sums = {name: part[name] + sums[name].to(images.device) for name in sums}
        return sums

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        matrix = sums["matrix"]
        truth, taken, right = matrix.sum(1), matrix.sum(0), matrix.diagonal()
        ious = {
            name: float(right[i] / (truth[i] + taken[i] - right[i]))
            for i, name in enumerate(self.classes)
            if truth[i] > 0
        }
        return {
            "miou": sum(ious.values()) / max(1, len(ious)),
            "pixel_accuracy": float(right.sum() / truth.sum().clamp(min=1)),
            "loss": float(sums["loss"] / sums["weight"]) if sums["weight"] > 0 else 0.0,
            **{f"iou_{name}": iou for name, iou in ious.items()},
        }

    def exported(self, model: nn.Module) -> nn.Module:
        return AtImageSize(model)

    def pictures(self, model: nn.Module, batch: Batch, pixels: Any) -> list[Picture]:
        pictures = []
        for image, mask, shown in zip(batch.images, batch.labels, pixels, strict=True):
            guess = self._scores(model(image[None]), image[None])[0].argmax(0)
            counts = mask != IGNORED
            right = float((guess == mask)[counts].double().mean()) if counts.any() else 0.0
            panels = [shown, self._coloured(mask), self._coloured(guess)]
            pictures.append(Picture(beside(panels), f"{right:.0%} of the pixels right", PANELS))
        return pictures

    @property
    def legend(self) -> dict[str, str]:
        colours = {name: in_hex(colour_of(i)) for i, name in enumerate(self.classes)}
        return {**colours, "ignored": in_hex(GREY)}

    def charts(self, sums: Mapping[str, Tensor]) -> list[Matrix]:
        shares = sums["matrix"] / sums["matrix"].sum(1, keepdim=True)
        values = [[None if math.isnan(share) else round(share, 6) for share in row] for row in shares.tolist()]
        caption = "Of each class's pixels (a row), the share that was taken for each class; grey: it has none."
        return [Matrix("confusion", self.classes, self.classes, values, "%", "truth", "prediction", caption)]

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

    def _matrix(self, scores: Tensor, masks: Tensor) -> Tensor:
        """Pixels by truth and prediction, [K, K], exact in float64."""
        classes = len(self.classes)
        # Pixels that do not count lie behind the matrix, and are cut off: nothing is read back from the device
        truth = masks.long()
        places = torch.where(truth != IGNORED, truth * classes + scores.detach().argmax(1), classes**2).flatten()
        ones = torch.ones_like(places, dtype=torch.float64)
        return ones.new_zeros(classes**2 + 1).index_add_(0, places, ones)[:-1].view(classes, classes)

    def _coloured(self, mask: Tensor) -> Tensor:
        """uint8 [3, H, W] of classes [H, W]."""
        colours = torch.tensor([*map(colour_of, range(len(self.classes)))], dtype=torch.uint8).view(-1, 3)
        colours = torch.cat([colours, colours.new_tensor(GREY).expand(256 - len(colours), 3)])
        return colours[mask.long().cpu()].permute(2, 0, 1)


class AtImageSize(nn.Module):
    """The scores [N, K, H, W] of a model for images [N, 3, H, W], whatever it returns them in, and at whatever size."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        scores = find_scores(self.model(images))
        assert scores is not None, "it was trained"
        # Where the size is the same already nothing changes; to ask would make a program for that case alone
        return F.interpolate(scores, images.shape[-2:], mode="bilinear")


def alike(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """The images and masks of a batch as tensors: one of each, or image by image where each has its own size."""
    if isinstance(batch.images, Tensor):
        return [(batch.images, batch.labels)]
    return [(image[None], mask[None]) for image, mask in zip(batch.images, batch.labels, strict=True)]


def beside(panels: Sequence[Tensor], gap: int = 2) -> Tensor:
    """Pictures [3, H, W] next to each other, with white between them."""
    white = torch.full((3, panels[0].shape[1], gap), 255, dtype=torch.uint8)
    return torch.cat([each for panel in panels for each in (panel, white)][:-1], 2)
