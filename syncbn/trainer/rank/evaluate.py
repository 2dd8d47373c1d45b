"""A checkpoint evaluated by itself: the figures that its run had last, or those on other data. It leaves nothing."""

from dataclasses import replace
from pathlib import Path

from syncbn.trainer import models, norms
from syncbn.trainer.config import Config
from syncbn.trainer.display.screen import Screen
from syncbn.trainer.log import log_to
from syncbn.trainer.rank.build import Parts, build_together
from syncbn.trainer.runs.folder import RunFolder
from syncbn.trainer.runs.metric import headline, in_words
from syncbn.trainer.training import resume
from syncbn.trainer.training.evaluation import evaluate_all
from syncbn.trainer.training.resume import Start
from syncbn.trainer.world import World


def evaluate(config: Config, ranks: World) -> int:
    """Evaluate a checkpoint and show its figures: the exit code. Collective."""
    log_to(None, warn=ranks.rank == 0)
    reduced = needed(config)
    norms.refuse_misfit(reduced.norm, ranks.size)
    start = resume.find_start_at(Path(config.checkpoint.resume), ranks)
    own = start if config.eval.recalibrate else None
    # The checkpoint's weights are all that is needed, wherever those are that its run began with
    parts = build_together(reduced, ranks, own, lambda parts: take_over(parts, start, config), load=False)
    show(parts, start, config, ranks)
    return ranks.from_rank_0(0)


def needed(config: Config) -> Config:
    """The config to build from: nothing in it that training alone needs could refuse other data."""
    config = replace(config, train=replace(config.train, cuda_graph=False))
    if config.eval.recalibrate:  # takes training batches, as they were
        return config
    return replace(
        config,
        data=replace(config.data, batch_per_rank=1),
        norm=replace(config.norm, group="world"),
        train=replace(config.train, accumulate=1),
    )


def take_over(parts: Parts, start: Start, config: Config) -> None:
    """Give the model the checkpoint's weights, those that its run evaluated. No rank speaks to another.

    Raises UserError if the classes are not as many, or the model is another. Other data is told in a warning.
    """
    start.refuse_other_classes(parts.data)
    weights = start.best_weights if averaged(start, config) else start.state["model"]
    models.load_all(parts.model, weights, config.model.name, start.path)
    if config.train.compile and not averaged(start, config):  # as in training
        parts.model.compile(fullgraph=True)


def averaged(start: Start, config: Config) -> bool:
    """Whether the average is evaluated: if there is one, and train.ema=0 does not ask for the weights themselves."""
    return bool(start.state["average"] and config.train.ema)


def show(parts: Parts, start: Start, config: Config, ranks: World) -> None:
    """Evaluate, show the figures, and leave them where the launcher looks for them. Collective."""
    recalibrate = config.eval.recalibrate
    figures = evaluate_all(parts.model, parts.task, parts.data, config.train, ranks, recalibrate=recalibrate).figures
    if ranks.rank > 0:
        return
    folder = RunFolder(config.run)
    folder.path.mkdir(parents=True)
    folder.write_result({"objective": figures[f"eval/{headline(parts.task.metrics).name}"], "metrics": figures})
    Screen(0).close(
        {
            **in_words({name: v for name, v in figures.items() if name.startswith("eval/")}, parts.task.metrics),
            "data": f"{config.data.name}, {len(parts.data.classes)} classes",
            "model": f"{config.model.name}, norm={config.norm.name}"
            + (", the average" if averaged(start, config) else ""),
            "ranks": f"{ranks.size} on {ranks.device.type}",
            "step": start.state["step"],
            "checkpoint": start.path,
        }
    )
