"""What each rank builds of the config by itself: data, task and model."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from syncbn.trainer import data, environment, models, norms, tasks
from syncbn.trainer.config import Config
from syncbn.trainer.errors import UserError
from syncbn.trainer.rank.agreement import refuse_other_data
from syncbn.trainer.training import cuda_graph
from syncbn.trainer.training.resume import Start
from syncbn.trainer.training.state import seed_generators
from syncbn.trainer.world import World


@dataclass
class Parts:
    """What each rank builds alone, and notes for the user: of images left out and weights loaded."""

    data: data.Data
    model: nn.Module
    converted: norms.Converted
    task: tasks.Task
    notes: list[str] = field(default_factory=list)


def build_together(
    config: Config, ranks: World, start: Start | None, check: Callable[[Parts], None], *, load: bool = True
) -> Parts:
    """Build on all ranks or on none, and be sure that all have the same data. Collective.

    check: raises UserError for parts that will not do; no rank speaks to another in it. load: as of build.
    """
    with ranks.together():
        parts = build(config, ranks, start, load=load)
        check(parts)
    refuse_other_data(parts.data, ranks)
    return parts


def build(config: Config, ranks: World, start: Start | None = None, *, load: bool = True) -> Parts:
    """Data, model and task. No rank speaks to another here.

    start: one of this run's own keeps its global batch. load: whether the weights are, that the model starts from.
    """
    if config.train.cuda_graph:
        cuda_graph.prepare(ranks.device)
    seed_generators(config.seed)
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    needs = tasks.build(config.task)
    refuse_misfit(needs, config)
    images = data.build(
        config.data,
        ranks,
        seed=config.seed,
        accumulate=config.train.accumulate,
        memory_format=memory_format,
        global_batch=start and start.global_batch,
        start=start.state["step"] if start else 0,
        targets=needs.targets,
        stacked=needs.stacked,
    )
    notes = [*images.notes]
    task = tasks.build(config.task, images.classes)
    outputs = task.outputs or len(images.classes)
    model = models.build(config.model, outputs, notes.append) if load else models.build_blank(config.model, outputs)
    model = model.to(ranks.device)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    place = norms.Place(ranks.device, ranks.size, environment.local_size(), images.global_batch)
    model, converted = norms.convert(model, config.norm, place)
    return Parts(images, model, converted, task, notes)


def refuse_misfit(task: tasks.Task, config: Config) -> None:
    """Raise UserError for a task that cannot have such a model, or a step that is one graph."""
    if models.is_detector(config.model.name) and task.targets not in tasks.BOXES:
        raise UserError(
            f"model.name={config.model.name} finds boxes, of which task={config.task.name} knows nothing: take "
            "task=detect, or another model"
        )
    for key in "compile", "cuda_graph":
        if getattr(config.train, key) and not task.fixed_shapes:
            raise UserError(
                f"train.{key}=true with task={config.task.name}: a graph does the same in each step, and what this "
                f"task does depends on the boxes of each image; train.{key}=false"
            )
