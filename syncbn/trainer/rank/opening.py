"""A run's beginning as rank 0 shows it: data, model, norm and batch in a line, what is left out, and warnings."""

import logging
from typing import Any

from syncbn.trainer import norms
from syncbn.trainer.config import Config
from syncbn.trainer.rank.build import Parts
from syncbn.trainer.rank.carriers import open_carriers
from syncbn.trainer.rank.rank0 import Watch
from syncbn.trainer.redact import redacted
from syncbn.trainer.runs.folder import RunFolder
from syncbn.trainer.training.state import Training
from syncbn.trainer.world import World

log = logging.getLogger(__name__)


def open_watch(
    folder: RunFolder,
    settings: dict[str, Any],
    config: Config,
    ranks: World,
    parts: Parts,
    training: Training,
    state: dict[str, Any] | None,
) -> Watch:
    """Rank 0's eyes on a training, once it is told what begins.

    settings: the config as it was given. state: what was saved of the watch that is gone on from.
    """
    carriers = open_carriers(folder, settings, config, ranks, parts, training, state)
    say = carriers.screen.say
    say(
        f"{config.data.name}, {data_set(parts)} | {config.model.name}, {converted(parts, config)} | "
        f"{images(ranks, parts)} on {ranks.device.type} | {carriers.screen.steps} steps"
    )
    for note in parts.notes if not training.step else ():
        say(note)
    if training.step:
        say(f"going on from step {training.step}")
    if config.norm.name != "local" and not parts.converted.changed:
        log.warning("norm=%s converted nothing: %s", config.norm.name, norms.nothing_converted(parts.model))
    norm = norms.NORMS[config.norm.name]
    if norm.scope == "none" and norm.running and not config.model.weights and not training.step:
        log.warning("norm=frozen without model.weights=: statistics that were never taken stay as they began")
    for line in parts.converted.notes:
        log.warning("norm=%s: %s", config.norm.name, line)
    sizes = {"ranks": ranks.size, "global_batch": parts.data.global_batch}
    return Watch(folder, carriers, parts.task.metrics, redacted(settings), converted(parts, config), sizes)


def data_set(parts: Parts) -> str:
    """How many images there are of how many classes, in words."""
    counts = parts.data.fingerprint
    return f"{counts['train']} + {counts['eval']} images of {counts['classes']} classes"


def images(ranks: World, parts: Parts) -> str:
    """How many images each rank takes at once, in words."""
    each, left = divmod(parts.data.global_batch, ranks.size)
    return f"{parts.data.global_batch} images over {ranks.size} ranks" if left else f"{ranks.size} × {each} images"


def converted(parts: Parts, config: Config) -> str:
    converted, frozen = parts.converted, len(norms.frozen_batch_norms(parts.model))
    done = f"norm={config.norm.name}: {converted.changed} of {converted.layers} batch norm layers converted"
    return f"{done}, {frozen} frozen ({norms.THAW})" if frozen else done
