"""One run, one folder: its name, who may write to it, and where things lie in it."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from syncbn.trainer.errors import UserError

# Sections and keys that do not shape what is learnt: two configs that differ in them alone are one run.
OUTSIDE = (
    "run",
    "wandb",
    "launch",
    "drift",
    "checkpoint",
    "task.mode",
    "data.root",
    "data.download",
    "data.workers",
    "data.cache",
    "train.log_every",
)


@dataclass
class RunConfig:
    name: str | None = None  # none: made of the choices and the seed, never of the clock
    root: str = "runs"  # folder of all runs
    overwrite: bool = False  # replace a run of the same name that had another config

    def __post_init__(self) -> None:
        if self.name is not None and (Path(self.name).name != self.name or self.name.startswith(".")):
            raise UserError(f"run.name={self.name}: give one folder's name; run.root says where it lies")


class RunFolder:
    """Paths of a run. It is made by `create`, once everything that could refuse has had its say."""

    def __init__(self, config: RunConfig):
        assert config.name, "a run is named before it has a folder"
        self.overwrite = config.overwrite
        self.path = Path(config.root) / config.name
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"
        self.report = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"

    def refuse_other(self, config: dict[str, Any]) -> None:
        """Raise if the folder holds a run of another config (unless it may be replaced), or no run at all."""
        if not self.path.exists():
            return
        if not self.config.is_file():
            raise UserError(f"{self.path} exists and is no run (it has no config.yaml): choose another run.name=")
        if self.overwrite:
            return
        changes = differences(yaml.safe_load(self.config.read_text()), config)
        if changes:
            raise UserError(
                f"{self.path} holds a run with another config ({', '.join(changes)}): "
                "choose another run.name=, or run.overwrite=true replaces it"
            )

    def holds(self, config: dict[str, Any]) -> bool:
        """Whether there is a run of this config in it."""
        return self.config.is_file() and not differences(yaml.safe_load(self.config.read_text()), config)

    def finished(self, config: dict[str, Any]) -> bool:
        """Whether a run of this config has come to its end in it."""
        return self.result.is_file() and self.holds(config)

    def create(self, config: dict[str, Any]) -> None:
        """Make the folder anew, with the config in it; the logs of an attempt at the same run are kept."""
        if self.path.exists():
            again = self.holds(config)
            for entry in self.path.iterdir():
                if entry.is_symlink() or not entry.is_dir():
                    entry.unlink()
                elif not (again and entry == self.logs):
                    shutil.rmtree(entry)
        self.checkpoints.mkdir(parents=True)
        self.logs.mkdir(exist_ok=True)
        self.config.write_text(yaml.safe_dump(config, sort_keys=False))


def name_of(config: dict[str, Any], experiment: str | None, overrides: Sequence[str]) -> str:
    """A run's name from what was chosen: experiment or data set, model, norm, batch, other overrides, seed."""
    told = ("experiment", "data", "data.name", "model.name", "norm", "norm.name", "data.batch_per_rank", "seed")
    parts = [
        experiment or config["data"]["name"],
        config["model"]["name"].replace(":", "."),
        config["norm"]["name"],
        f"b{config['data']['batch_per_rank']}",
    ]
    values: dict[str, str] = {}
    for override in overrides:  # the last word on a key counts
        key, _, value = override.lstrip("+~").partition("=")
        values[key] = value
    for key, value in sorted(values.items()):
        if key not in told and not _outside(key):
            parts.append(f"{key}_{value}".replace("/", "_"))
    return "-".join([*parts, f"seed{config['seed']}"])


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What shapes the training and differs: "optim.lr 0.1 -> 0.2" each."""
    before, after = flat(old), flat(new)
    keys = [key for key in before | after if not _outside(key) and before.get(key) != after.get(key)]
    return [f"{key} {before.get(key)} -> {after.get(key)}" for key in keys]


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config with its keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _outside(key: str) -> bool:
    return any(key == part or key.startswith(part + ".") for part in OUTSIDE)
