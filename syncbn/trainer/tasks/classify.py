"""Classification of images: cross-entropy and accuracy."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from syncbn.trainer.data import Batch


class Classify:
    """One class per image; labels are classes [B], or weights [B, K] where images were mixed."""

    objective = "accuracy"

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scores = _at_least_float32(model(batch.images))
        total = F.cross_entropy(scores, batch.labels, reduction="sum", label_smoothing=self.label_smoothing)
        return total / max(1, len(scores)), self._sums(scores, batch.labels, total)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        scores = _at_least_float32(model(batch.images))
        # Each image rounded alone and added up in float64: the same total for any share of the images
        losses = F.cross_entropy(scores, batch.labels, reduction="none").double()
        return self._sums(scores, batch.labels, losses.sum())

    def sums(self) -> tuple[str, ...]:
        return "loss", "correct", "samples"

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        samples = max(1.0, sums["samples"])
        return {"loss": sums["loss"] / samples, "accuracy": sums["correct"] / samples}

    def _sums(self, scores: Tensor, labels: Tensor, loss: Tensor) -> dict[str, Tensor]:
        classes = labels if labels.ndim == 1 else labels.argmax(1)
        correct = (scores.detach().argmax(1) == classes).sum()
        return {"loss": loss.detach(), "correct": correct, "samples": correct.new_full((), len(scores))}


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
