"""What is learnt, by name: a task is one file, and all that the rest of the trainer knows of it is here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module

from syncbn.trainer.data import TARGETS
from syncbn.trainer.errors import UserError
from syncbn.trainer.option import option
from syncbn.trainer.runs.metric import Metric
from syncbn.trainer.runs.pictures import Box, Curves, Matrix
from syncbn.trainer.tasks.classify import Classify
from syncbn.trainer.tasks.detect import Detect
from syncbn.trainer.tasks.objective import Objective
from syncbn.trainer.tasks.segment import Segment
from syncbn.trainer.tasks.task import BOXES, Loss, Picture, Sums, Task

HELP = "docs/tasks.md tells what a task is"

__all__ = [
    "BOXES", "TASKS", "Box", "Curves", "Loss", "Matrix", "Metric", "Picture", "Sums", "Task", "TaskConfig", "build",
]  # fmt: skip


@dataclass
class TaskConfig:
    name: str = option("classify", "or your own: package.module:builder")
    mode: str = option("train", "train; or evaluate, by task=evaluate: the figures of checkpoint=PATH and no more")
    label_smoothing: float = option(0.0, "share of a label spread over all classes (Szegedy et al. 2016)")
    class_weights: str = option("none", "segment: auto weighs classes by how few training pixels they have (ENet)")
    dice: float = option(0.0, "segment: weight of the Dice loss of each image beside the cross-entropy")
    ohem: float = option(0.0, "segment: only pixels whose true class has less than this probability count; 0: all")
    aux_weight: float = option(0.4, "segment: weight of the loss of the model's auxiliary head, where it has one")
    masks: bool = option(False, "detect: learn from the mask of each object too, as Mask R-CNN does")

    def __post_init__(self) -> None:
        if self.name not in TASKS and ":" not in self.name:
            raise UserError(f"task={self.name}: choose one of {', '.join(TASKS)}, or your own, package.module:builder")
        if self.mode not in ("train", "evaluate"):
            raise UserError(f"task.mode={self.mode}: choose one of train, evaluate")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task.label_smoothing={self.label_smoothing}: give a share from 0 up to 1")
        if self.class_weights not in ("none", "auto"):
            raise UserError(f"task.class_weights={self.class_weights}: choose one of none, auto")
        if not 0 <= self.ohem <= 1:
            raise UserError(f"task.ohem={self.ohem}: give a probability, such as 0.7, or 0 for all pixels")
        for name in "dice", "aux_weight":
            if getattr(self, name) < 0:
                raise UserError(f"task.{name}={getattr(self, name)}: give 0 (off) or more")


def build(config: TaskConfig, classes: Sequence[str] | None = None) -> Task:
    """The task of the config. classes: the names of the data's; None: not known yet, where no batch is to come.

    Raises UserError for package.module:builder that cannot be imported, or whose builder(config, classes) returns no
    task.
    """
    if config.name in TASKS:
        return TASKS[config.name](config, classes)
    module, _, builder = config.name.partition(":")
    try:
        build_own = getattr(import_module(module), builder)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"task.name={config.name}: {error}; it must be package.module:builder, importable from here"
        ) from error
    task = build_own(config, classes)
    if misfit := _misfit(task):
        raise UserError(f"task.name={config.name} {misfit}")
    return task


def _misfit(task: object) -> str | None:
    """Why what a builder returned is no task; None if it is one."""
    if not isinstance(task, Task):
        return f"returned {type(task).__name__}, which does not inherit from syncbn.trainer.tasks.Task: {HELP}"
    if lacking := [name for name in ("metrics", "shapes") if not hasattr(task, name)]:
        return f"returned {type(task).__name__}, without {' and '.join(lacking)}: {HELP}"
    headlines = [metric.name for metric in task.metrics if metric.headline]
    if len(headlines) != 1:
        return (
            f"has {len(headlines)} headlines among its metrics ({', '.join(metric.name for metric in task.metrics)}): "
            "give headline=True to the one it is judged by"
        )
    for name, choices in ("weighs", ("images", "values")), ("targets", TARGETS):
        if getattr(task, name) not in choices:
            return f"has {name}={getattr(task, name)!r}: choose one of {', '.join(choices)}"
    if twice := task.shapes.keys() & task.rows.keys():
        return f"has {', '.join(sorted(twice))} among its shapes and its rows: give each a name of its own"
    return None


def _objective(config: TaskConfig) -> Objective:
    return Objective(**{key.name: getattr(config, key.name) for key in fields(Objective)})


TASKS: dict[str, Callable[[TaskConfig, Sequence[str] | None], Task]] = {
    "classify": lambda config, classes: Classify(config.label_smoothing, classes),
    "segment": lambda config, classes: Segment(classes, _objective(config)),
    "detect": lambda config, classes: Detect(classes, config.masks),
}
