"""Weights & Biases as a view of the record: it may fail, and training goes on."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from syncbn.trainer.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class WandbConfig:
    mode: str = "offline"  # offline: files in the run's folder, nothing sent; online: sent as well; disabled: neither
    project: str = "syncbn"
    entity: str | None = None
    group: str | None = None  # none: the run's name without its seed, so that seeds lie together
    job_type: str = "train"
    tags: list[str] = field(default_factory=list)
    timeout_s: float = 30.0  # how long to wait for the server at the start

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online", "disabled"):
            raise UserError(f"wandb.mode={self.mode}: choose one of offline, online, disabled")


Table = tuple[list[str], list[list[Any]]]
"""Names of columns, and rows."""


class Tracker:
    """One W&B run. The first failure is reported, and ends the tracking alone."""

    def __init__(self, config: WandbConfig, folder: Path, *, name: str, group: str, settings: dict[str, Any]):
        self.run: Any = None
        self.failure: str | None = None
        if config.mode == "disabled":
            return

        def start() -> None:
            import wandb  # here: only rank 0 tracks, and only if it is wanted

            self.run = wandb.init(
                mode=config.mode,  # pyright: ignore[reportArgumentType]  (checked above)
                dir=folder,
                project=config.project,
                entity=config.entity,
                group=config.group or group,
                job_type=config.job_type,
                tags=config.tags,
                name=name,
                config=settings,
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, save_code=False, init_timeout=config.timeout_s
                ),
            )
            self.run.define_metric("train/*", step_metric="step")
            self.run.define_metric("eval/*", step_metric="step")
            self.run.define_metric("drift/*", step_metric="step")
            self.run.define_metric("eval/accuracy", summary="max,last")

        self._try(start)

    @property
    def files(self) -> Path | None:
        """The folder of this run's W&B files."""
        return None if self.run is None else Path(self.run.settings.sync_dir)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._try(lambda: self.run and self.run.log({"step": step, **figures}, step=step))

    def alert(self, title: str, text: str) -> None:
        """Have W&B tell the user, as they have chosen there: by mail, say."""
        self._try(lambda: self.run and self.run.alert(title=title, text=text, wait_duration=0))

    def keep(self, pictures: dict[str, Any], tables: dict[str, Table], summary: dict[str, Any]) -> None:
        """Log what a run comes to: pictures, tables, and what is to stand in its summary."""

        def log_all() -> None:
            import wandb

            if self.run is None:
                return
            logged: dict[str, Any] = {name: wandb.Image(picture) for name, picture in pictures.items()}
            logged |= {name: wandb.Table(columns=[*columns], data=rows) for name, (columns, rows) in tables.items()}
            if logged:
                self.run.log(logged)
            self.run.summary.update(summary)

        self._try(log_all)

    def finish(self, exit_code: int = 0) -> None:
        self._try(lambda: self.run and self.run.finish(exit_code=exit_code))

    def _try(self, act: Callable[[], Any]) -> None:
        if self.failure is not None:
            return
        try:
            act()
        except Exception as error:  # whatever it is, it is not the training's
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("W&B failed and is left out from here on (%s); metrics.jsonl has every figure", self.failure)
