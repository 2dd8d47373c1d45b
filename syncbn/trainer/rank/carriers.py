"""What carries a run to its user: the screen, files, W&B; opened for a run, or where an earlier process left them."""

from dataclasses import asdict, dataclass
from typing import Any

from syncbn.trainer.config import Config
from syncbn.trainer.display.screen import Screen
from syncbn.trainer.display.wandb_run import Tracker, WandbConfig
from syncbn.trainer.rank.build import Parts
from syncbn.trainer.redact import redacted
from syncbn.trainer.runs.checkpoint import Checkpoints
from syncbn.trainer.runs.folder import RunFolder
from syncbn.trainer.runs.record import Record
from syncbn.trainer.runs.status_file import Pulse
from syncbn.trainer.training.drift import Story
from syncbn.trainer.training.state import Training
from syncbn.trainer.world import World


@dataclass
class Carriers:
    """On rank 0 alone."""

    screen: Screen
    record: Record
    tracker: Tracker
    checkpoints: Checkpoints
    pulse: Pulse
    story: Story

    def state_dict(self) -> dict[str, Any]:
        """What has to be known of them to go on in another process."""
        return {
            "record": self.record.state_dict(),
            "story": self.story.state_dict(),
            "wandb": self.tracker.run_id,
        }


def open_carriers(
    folder: RunFolder,
    settings: dict[str, Any],
    config: Config,
    ranks: World,
    parts: Parts,
    training: Training,
    state: dict[str, Any] | None,
) -> Carriers:
    """settings: the config as it was given. state: what state_dict gave in the process that is gone on from."""
    state = state or {"record": None, "story": None, "wandb": None}
    steps = config.train.total_steps(parts.data.steps_per_epoch)
    metrics, keep, name = parts.task.metrics, config.checkpoint, config.run.name or ""
    folder.name_metrics(metrics)
    record = Record(folder.metrics, state["record"])
    tracker = Tracker(
        WandbConfig(**redacted(asdict(config.wandb))),
        folder.path.absolute(),
        name=name,
        group=name.removesuffix(f"-seed{config.seed}"),
        settings=redacted(settings),
        run_id=state["wandb"],
        earlier=record.numbers(),
        metrics=metrics,
    )
    return Carriers(
        Screen(steps, metrics=metrics),
        record,
        tracker,
        Checkpoints(folder.checkpoints, keep=keep.keep, background=keep.background),
        Pulse(folder.status, step=training.step, steps=steps, epoch=training.epoch, world_size=ranks.size),
        Story(state["story"]),
    )
