"""Classification of images: cross-entropy and accuracy."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from syncbn.trainer.data import Batch
from syncbn.trainer.errors import UserError
from syncbn.trainer.runs.metric import CLASSIFICATION
from syncbn.trainer.tasks.task import Loss, Picture, Sums, Task

NAMES = ("logits", "out")  # that models give their scores in an output of several


class Classify(Task):
    """One class per image; labels are classes [B], or weights [B, K] where images were mixed.

    classes: by name, for each of which a model is to give an image a score; None: any number of scores.
    """

    metrics = CLASSIFICATION
    shapes: ClassVar[dict[str, tuple[int, ...]]] = {"loss": (), "correct": (), "samples": ()}

    def __init__(self, label_smoothing: float = 0.0, classes: Sequence[str] | None = None):
        self.label_smoothing, self.classes = label_smoothing, classes
        self.outputs = None if classes is None else len(classes)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        scores = self._scores(model, batch)
        total = F.cross_entropy(scores, batch.labels, reduction="sum", label_smoothing=self.label_smoothing)
        sums = self._sums(scores, batch.labels, total)
        return Loss(total, sums["samples"], sums)

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        scores = self._scores(model, batch)
        # Each image rounded alone and added up in float64: the same total for any share of the images
        losses = F.cross_entropy(scores, batch.labels, reduction="none").double()
        return self._sums(scores, batch.labels, losses.sum())

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        samples = sums["samples"].clamp(min=1)
        return {"loss": float(sums["loss"] / samples), "accuracy": float(sums["correct"] / samples)}

    def pictures(self, model: nn.Module, batch: Batch, pixels: Tensor) -> list[Picture]:
        shares, guesses = self._scores(model, batch).softmax(1).max(1)
        names = self.classes or range(1 + int(max(guesses.max(), batch.labels.max())))
        pictures = []
        for image, label, guess, share in zip(pixels, batch.labels, guesses, shares, strict=True):
            wrong = f", taken for {names[int(guess)]} ({share:.0%})" if guess != label else ""
            pictures.append(Picture(image, f"{names[int(label)]}{wrong}"))
        return pictures

    def _scores(self, model: nn.Module, batch: Batch) -> Tensor:
        try:
            output = model(batch.images)
        except Exception as error:
            error.add_note(f"the model was given images {[*batch.images.shape]}")
            raise
        scores = find_scores(output)
        wanted = len(batch.images), self.outputs or (scores.shape[-1] if scores is not None and scores.ndim else 0)
        if scores is None or scores.shape != wanted:
            given = _described(output) if scores is None else f"scores {[*scores.shape]}"
            raise UserError(
                f"the model gives {given} for images {[*batch.images.shape]}: its forward must return scores "
                f"[{wanted[0]}, {self.outputs or 'classes'}], by themselves, as the first tensor of a tuple, or named "
                f"{' or '.join(NAMES)}",
                on_every_rank=True,
            )
        return _at_least_float32(scores)

    def _sums(self, scores: Tensor, labels: Tensor, loss: Tensor) -> dict[str, Tensor]:
        classes = labels if labels.ndim == 1 else labels.argmax(1)
        correct = (scores.detach().argmax(1) == classes).sum()
        return {"loss": loss.detach(), "correct": correct, "samples": correct.new_full((), len(scores))}


def find_scores(output: Any) -> Tensor | None:
    """The scores in what a model returns: a tensor, or of several what is named so, else the first tensor."""
    if isinstance(output, Tensor):
        return output
    parts = dict(_parts(output))
    named = [parts[name] for name in NAMES if isinstance(parts.get(name), Tensor)]
    return next((part for part in [*named, *parts.values()] if isinstance(part, Tensor)), None)


def _parts(output: Any) -> Iterator[tuple[Any, Any]]:
    """Name, or place, and value of each part of a dict, dataclass, namedtuple, tuple or list."""
    if isinstance(output, Mapping):
        yield from output.items()
    elif is_dataclass(output):
        yield from ((field.name, getattr(output, field.name)) for field in fields(output))
    elif isinstance(output, tuple | list):
        yield from zip(getattr(output, "_fields", range(len(output))), output, strict=True)


def _described(output: Any) -> str:
    kinds = ", ".join(f"{name}: {type(part).__name__}" for name, part in _parts(output))
    return f"a {type(output).__name__}" + (f" of {kinds}" if kinds else "") + " and no tensor"


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
