"""What is learnt, by name: a task is one file, and all that the rest of the trainer knows of it is here."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from syncbn.trainer.errors import UserError
from syncbn.trainer.option import option
from syncbn.trainer.tasks.classify import Classify
from syncbn.trainer.tasks.task import Loss, Sums, Task

NAMES = ("weighs", "outputs", "metrics", "shapes", "loss", "evaluate", "figures")  # of Task
HELP = "docs/tasks.md lists what a task has"

__all__ = ["TASKS", "Loss", "Sums", "Task", "TaskConfig", "build"]


@dataclass
class TaskConfig:
    name: str = option("classify", "or your own: package.module:builder")
    mode: str = option("train", "train; or evaluate, by task=evaluate: the figures of checkpoint=PATH and no more")
    label_smoothing: float = option(0.0, "share of a label spread over all classes (Szegedy et al. 2016)")

    def __post_init__(self) -> None:
        if self.name not in TASKS and ":" not in self.name:
            raise UserError(f"task={self.name}: choose one of {', '.join(TASKS)}, or your own, package.module:builder")
        if self.mode not in ("train", "evaluate"):
            raise UserError(f"task.mode={self.mode}: choose one of train, evaluate")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task.label_smoothing={self.label_smoothing}: give a share from 0 up to 1")


def build(config: TaskConfig, classes: int | None = None) -> Task:
    """The task of the config. classes: of the data; None: not known, where only names are asked for.

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
    if lacking := [name for name in NAMES if not hasattr(task, name)]:
        raise UserError(f"task.name={config.name} returned {type(task).__name__}, without {', '.join(lacking)}: {HELP}")
    headlines = [metric.name for metric in task.metrics if metric.headline]
    if len(headlines) != 1:
        raise UserError(
            f"task.name={config.name} has {len(headlines)} headlines among its metrics "
            f"({', '.join(metric.name for metric in task.metrics)}): give headline=True to the one it is judged by"
        )
    if task.weighs not in ("images", "values"):
        raise UserError(f"task.name={config.name} has weighs={task.weighs!r}: choose one of images, values")
    return task


TASKS: dict[str, Any] = {"classify": lambda config, classes: Classify(config.label_smoothing, classes)}
