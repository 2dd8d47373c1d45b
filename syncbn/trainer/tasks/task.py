"""What a task tells the rest of the trainer: loop, screen, W&B, report, status, sweeps, probe and export."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from syncbn.trainer.runs.metric import Metric

Sums = dict[str, Tensor]
"""Totals over samples, of any shape: they add up over batches and ranks, in float64."""


class Loss(NamedTuple):
    """The loss of a batch: a sum over all that counts in it, [], and how much that is, [].

    What is optimised is the sum over all ranks and batches of a step, over the weight of all of them: the same for any
    split of the samples over ranks, also where a rank has nothing that counts.
    """

    total: Tensor
    weight: Tensor
    sums: Sums  # for the metrics


class Task(Protocol):
    """What is learnt from batches. One object on each rank, the same on all."""

    weighs: Literal["images", "values"]
    """What a loss's weight counts. images: those of the batch, so that the loop knows the sum and sends no message."""

    outputs: int | None
    """How many numbers the model is to give for an image: what its builder gets as num_classes."""

    metrics: Sequence[Metric]
    """Its figures; one of them is the headline, by which the best checkpoint and the points of a sweep are chosen."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of the sums, by name: a rank without a sample has none to tell by."""

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        """The loss of a batch in training; the model is called once, also for a batch without a sample."""
        ...

    def evaluate(self, model: nn.Module, batch: Any) -> Sums:
        """The sums of a batch in eval."""
        ...

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The metrics, by name, of sums over all batches and ranks (float64, on the CPU); all of them, or fewer."""
        ...
