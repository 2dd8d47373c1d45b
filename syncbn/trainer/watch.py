"""Rank 0's eyes on a run: what is shown, written down, sent to W&B and saved."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from syncbn.trainer import checkpoint, data, norms, tasks
from syncbn.trainer.config import Config, as_dict
from syncbn.trainer.console import Screen
from syncbn.trainer.folder import RunFolder
from syncbn.trainer.loop import Training
from syncbn.trainer.metrics import Record
from syncbn.trainer.tracking import Tracker
from syncbn.trainer.world import World

log = logging.getLogger(__name__)


@dataclass
class Parts:
    """What each rank builds alone."""

    data: data.Data
    model: nn.Module
    converted: int
    task: tasks.Task


class Watch:
    """Rank 0's eyes on a training: screen, record, W&B and checkpoints."""

    def __init__(self, folder: RunFolder, config: Config, ranks: World, parts: Parts, training: Training):
        self.folder, self.config, self.ranks = folder, config, ranks
        self.objective = f"eval/{parts.task.objective}"
        self.converted = converted(parts, config)
        steps = config.train.total_steps(parts.data.steps_per_epoch)
        self.screen = Screen(steps)
        self.screen.say(
            f"{config.data.name}, {len(parts.data.classes)} classes | {config.model.name}, {self.converted} | "
            f"{ranks.size} × {config.data.batch_per_rank} images on {ranks.device.type} | {steps} steps"
        )
        if config.norm.name != "local" and not parts.converted:
            log.warning("norm=%s converted nothing: %s", config.norm.name, norms.nothing_converted(parts.model))
        self.record = Record(folder.metrics)
        name = config.run.name or ""
        group = name.removesuffix(f"-seed{config.seed}")
        self.tracker = Tracker(config.wandb, folder.path.absolute(), name=name, group=group, settings=as_dict(config))
        self.screen.start()

    def stepped(self, step: int) -> None:
        self.screen.stepped(step)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.record.log(step, figures)
        self.tracker.log(step, figures)
        self.screen.log(step, figures)

    def save(self, training: Training) -> None:
        state = {
            "step": training.step,
            "model": training.model.module.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "schedule": training.schedule.state_dict(),
        }
        if training.average:
            state["average"] = training.average.state_dict()
        checkpoint.save(self.folder.checkpoint, state)

    def give_up(self) -> None:
        self.screen.stop()
        self.record.close()
        self.tracker.finish(exit_code=1)

    def finish(self, figures: dict[str, float], duration_s: float) -> None:
        self.record.close()
        result = {
            "objective": figures[self.objective],
            "metrics": figures,
            "ranks": self.ranks.size,
            "duration_s": round(duration_s, 1),
        }
        self.folder.result.write_text(json.dumps(result, indent=1) + "\n")
        self.tracker.finish()
        self.screen.close(
            {
                **shown(figures),
                "norm": self.converted.removeprefix("norm="),
                "time": f"{duration_s:.0f} s",
                **self.where_to_look(),
            }
        )

    def where_to_look(self) -> dict[str, Any]:
        rows = {"run": f"{self.folder.path}/", "figures": self.folder.metrics, "weights": self.folder.checkpoint}
        if self.tracker.failure:
            return {**rows, "W&B": f"failed: {self.tracker.failure}"}
        if files := self.tracker.files:
            files = files.relative_to(Path.cwd()) if files.is_relative_to(Path.cwd()) else files
            return {**rows, "look": f"wandb leet {files}", "upload": f"wandb sync {files}"}
        return rows


def converted(parts: Parts, config: Config) -> str:
    total = len(norms.batch_norms(parts.model))
    return f"norm={config.norm.name}: {parts.converted} of {total} batch norm layers converted"


def shown(figures: dict[str, float]) -> dict[str, str]:
    """Metrics as a person reads them."""
    shares = ("accuracy",)
    return {k: f"{v:.2%}" if k.endswith(shares) else f"{v:.4f}" if v % 1 else f"{v:.0f}" for k, v in figures.items()}
