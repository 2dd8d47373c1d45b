"""Object detection: boxes of objects and their classes, judged by COCO's average precision."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from syncbn.trainer.data import Batch
from syncbn.trainer.errors import UserError
from syncbn.trainer.norms.unseen import unseen
from syncbn.trainer.runs.metric import Metric
from syncbn.trainer.runs.pictures import Box, Curves
from syncbn.trainer.tasks.coco import Precision, average_precision, metrics_of, precision_recall
from syncbn.trainer.tasks.colours import colour_of, in_hex
from syncbn.trainer.tasks.divisors import divisors
from syncbn.trainer.tasks.task import Loss, Picture, Task

CONVENTION = (
    "its forward must take (images, targets) and return a dict of losses in training, and in eval a dict of boxes, "
    "scores and labels for each image, as torchvision.models.detection has it"
)
NOTHING = 32  # side of what a rank without an image shows its model


class Detect(Task):
    """The losses of a detector that computes them itself, each divided by what there is of it on all ranks.

    classes: of objects, by name; label k is classes[k - 1], and 0 the background. masks: whether the model learns from
    the mask of each object too, as Mask R-CNN does.

    Source of the calling convention: torchvision.models.detection.
    """

    weighs = "values"
    stacked = False
    fixed_shapes = False
    rows: ClassVar = {"predictions": (6,), "truth": (7,)}
    shapes: ClassVar = {"loss": (), "weight": ()}

    def __init__(self, classes: Sequence[str] | None = None, masks: bool = False):
        self.classes = classes or ()
        self.outputs = len(self.classes) + 1 if self.classes else None
        self.targets = "instances" if masks else "boxes"
        self.metrics = (*metrics_of(self.classes), Metric("loss", better="less"))
        self._judged: tuple[Any, Precision] | None = None

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        total, weight = self._sums(model, batch)
        # What is shown is a mean over images where there are several divisors
        one = len(total) == 1
        sums = {
            "loss": (total if one else batch.samples * total / weight.clamp(min=1)).detach().sum(dtype=torch.float64),
            "weight": (weight[0] if one else weight.new_tensor(batch.samples)).double(),
        }
        return Loss(total[0], weight[0], sums) if one else Loss(total, weight, sums)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self.shapes.items()}
        if model.training:  # for the statistics of its norms alone
            self._sums(model, batch)
            return sums
        predicted = self._predicted(model, batch.images) if batch.samples else []
        return {**sums, "predictions": predicted, "truth": [truth_rows(target) for target in batch.labels]}

    def figures(self, sums: Mapping[str, Any]) -> dict[str, float]:
        figures = {"loss": float(sums["loss"] / sums["weight"])} if sums["weight"] > 0 else {}
        return figures | (self._precision(sums).figures if "truth" in sums else {})

    def exported(self, model: nn.Module) -> None:
        return None

    def pictures(self, model: nn.Module, batch: Batch, pixels: Any) -> list[Picture]:
        pictures = []
        for image, target, shown in zip(batch.images, batch.labels, pixels, strict=True):
            (predicted,) = self._predicted(model, [image])
            boxes = {
                "truth": [self._box(corners, label) for *corners, label, _, _ in truth_rows(target).tolist()],
                "prediction": [self._box(corners, label, score) for *corners, score, label in predicted.tolist()],
            }
            pictures.append(Picture(shown, boxes=boxes))
        return pictures

    @property
    def legend(self) -> dict[str, str]:
        return {name: in_hex(colour_of(i + 1)) for i, name in enumerate(self.classes)}

    def charts(self, sums: Mapping[str, Any]) -> list[Curves]:
        return precision_recall(self._precision(sums))

    def _precision(self, sums: Mapping[str, Any]) -> Precision:
        """Of an evaluation, computed once."""
        if self._judged is None or self._judged[0] is not sums:
            self._judged = sums, average_precision(sums["predictions"], sums["truth"], self.classes)
        return self._judged[1]

    def _sums(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The model's losses as sums, and what each is to be divided by, [K] both."""
        own = getattr(model, "module", model)  # of DDP
        refuse_other_forward(own)
        refuse_masks(own, self.targets)
        if batch.samples:
            with divisors(own, batch.samples) as seen:
                losses = model(batch.images, [self._learnt(target) for target in batch.labels])
            return seen.undone(refuse_other_losses(losses))
        # No model of torchvision's can be called without an image, and the other ranks wait in its norms
        image = next(own.parameters()).new_zeros(3, NOTHING, NOTHING)
        with unseen(own), divisors(own, 1) as seen:
            losses = model([image], [self._nothing(image)])
        sums, weights = seen.undone(refuse_other_losses(losses))
        return sums * 0, weights * 0

    def _learnt(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of an image's boxes is learnt from: all but crowds."""
        names = ("boxes", "labels", "masks") if self.targets == "instances" else ("boxes", "labels")
        return {name: target[name][~target["crowd"]] for name in names}

    def _nothing(self, image: Tensor) -> dict[str, Tensor]:
        none = {"boxes": image.new_zeros(0, 4), "labels": image.new_zeros(0, dtype=torch.int64)}
        masks = {"masks": image.new_zeros(0, *image.shape[1:], dtype=torch.uint8)}
        return none | masks if self.targets == "instances" else none

    def _predicted(self, model: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
        """Of each image, [n, 6]: left, top, right, bottom, score and label, the best first."""
        outputs = model([*images])
        refuse_other_predictions(outputs, len(images))
        rows = []
        for each in outputs:
            best = each["scores"].argsort(descending=True, stable=True)
            columns = each["boxes"], each["scores"][:, None], each["labels"][:, None]
            rows.append(torch.cat([column[best].double() for column in columns], 1))
        return rows

    def _box(self, corners: Sequence[float], label: float, score: float | None = None) -> Box:
        name = self.classes[int(label) - 1] if 0 < label <= len(self.classes) else f"class {label:.0f}"
        return Box(*corners, name=name, score=score)


def truth_rows(target: Mapping[str, Tensor]) -> Tensor:
    """Of an image's boxes, [n, 7]: left, top, right, bottom, label, area and whether it is a crowd."""
    columns = [target["boxes"], *(target[name][:, None] for name in ("labels", "areas", "crowd"))]
    return torch.cat([column.double() for column in columns], 1)


def refuse_other_forward(model: nn.Module) -> None:
    """Raise UserError for a model that cannot be called with images and targets."""
    try:
        inspect.signature(model.forward).bind(None, None)
    except TypeError as error:
        raise UserError(f"task=detect cannot train {type(model).__name__}: {CONVENTION}", on_every_rank=True) from error


def refuse_masks(model: nn.Module, targets: str) -> None:
    """Raise UserError for torchvision's Mask R-CNN, if no masks come with the boxes."""
    heads: Any = getattr(model, "roi_heads", None)
    if targets == "boxes" and hasattr(heads, "has_mask") and heads.has_mask():
        raise UserError(
            f"{type(model).__name__} learns from a mask of each object too, and task.masks=false: task.masks=true, "
            "with data that has them (digit_scenes, coco_detection)",
            on_every_rank=True,
        )


def refuse_other_losses(losses: Any) -> Mapping[str, Tensor]:
    if not (isinstance(losses, Mapping) and losses and all(isinstance(loss, Tensor) for loss in losses.values())):
        raise UserError(f"the model gives {type(losses).__name__} in training: {CONVENTION}", on_every_rank=True)
    return losses


def refuse_other_predictions(outputs: Any, images: int) -> None:
    if not (isinstance(outputs, Sequence) and len(outputs) == images and all(map(is_prediction, outputs))):
        raise UserError(f"the model's output in eval, for {images} images, is none of boxes: {CONVENTION}")


def is_prediction(output: Any) -> bool:
    """Whether it has boxes [n, 4], scores [n] and labels [n]."""
    if not isinstance(output, Mapping):
        return False
    boxes, scores, labels = ([*getattr(output.get(name), "shape", ())] for name in ("boxes", "scores", "labels"))
    return len(scores) == 1 and labels == scores and boxes == [*scores, 4]
