"""What the config says of a run's folder and of its checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from syncbn.trainer.errors import UserError
from syncbn.trainer.option import option

LONGEST = 200  # bytes of a run's name; file systems take 255 for a name


@dataclass
class RunConfig:
    name: str | None = option(None, "none: made of the choices and the seed, never of the clock")
    root: str = option("runs", "folder of all runs")
    overwrite: bool = option(False, "replace a run of the same name that had another config")

    def __post_init__(self) -> None:
        if self.name is not None and (Path(self.name).name != self.name or self.name[:1] in ("", ".")):
            raise UserError(f"run.name={self.name}: give one folder's name; run.root says where it lies")
        if self.name is not None and not is_legal(self.name):
            raise UserError(f"run.name={self.name}: give a name of at most {LONGEST} bytes without control characters")
        if not self.root:
            raise UserError("run.root is empty: give the folder of all runs, or . for this one")


@dataclass
class CheckpointConfig:
    every: int | None = option(None, "steps between checkpoints; there is one at each eval and at the end anyhow")
    keep: int = option(2, "of the latest, so many; and the best")
    background: bool = option(True, "write while training goes on; it waits only for the checkpoint before")
    resume: str = option(
        "auto", "auto: where this run was left; none: begin anew; or another run's checkpoint or folder"
    )

    def __post_init__(self) -> None:
        for name in "every", "keep":
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{name}={value}: give 1 or more")
        if not self.resume:
            raise UserError("checkpoint.resume=: give auto, none, or the path of a checkpoint or of a run's folder")


def is_legal(name: str) -> bool:
    """Whether it is one folder's name, of at most LONGEST bytes, all printable, and not hidden."""
    return name.isprintable() and len(name.encode()) <= LONGEST and name[:1] not in ("", ".") and "/" not in name
