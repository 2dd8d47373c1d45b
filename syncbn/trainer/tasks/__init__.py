"""What is learnt: a task owns the loss and the metrics, the loop owns the steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from syncbn.trainer.errors import UserError
from syncbn.trainer.tasks.classify import Classify

Sums = dict[str, Tensor]
"""Totals over samples, [] each: they add up over batches and ranks."""


class Task(Protocol):
    objective: str  # the metric that says how good a run is; more is better

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Sums]:
        """The training loss [], a mean over this rank's batch, and sums for the metrics."""
        ...

    def evaluate(self, model: nn.Module, batch: Any) -> Sums:
        """The sums of a batch in eval."""
        ...

    def sums(self) -> tuple[str, ...]:
        """The names of the sums, the same on every rank even if it has no sample."""
        ...

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The metrics of summed sums."""
        ...


@dataclass
class TaskConfig:
    name: str = "classify"
    mode: str = "train"  # train; or evaluate, by task=evaluate: the figures of checkpoint=PATH and no more
    label_smoothing: float = 0.0  # share of a label spread over all classes (Szegedy et al. 2016)

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise UserError(f"task={self.name}: choose one of {', '.join(TASKS)}")
        if self.mode not in ("train", "evaluate"):
            raise UserError(f"task.mode={self.mode}: choose one of train, evaluate")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task.label_smoothing={self.label_smoothing}: give a share from 0 up to 1")


def build(config: TaskConfig, classes: int | None = None) -> Task:
    """classes: of the data; None: as many as the model has scores for."""
    return TASKS[config.name](config, classes)


TASKS: dict[str, Callable[[TaskConfig, int | None], Task]] = {
    "classify": lambda config, classes: Classify(config.label_smoothing, classes)
}
