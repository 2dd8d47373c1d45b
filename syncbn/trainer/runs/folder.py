"""One run, one folder: its name, who may write to it, and where things lie in it."""

import json
import os
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from syncbn.trainer.errors import UserError
from syncbn.trainer.files import BESIDE, put_file
from syncbn.trainer.option import flat
from syncbn.trainer.redact import redacted
from syncbn.trainer.runs import lock, status_file
from syncbn.trainer.runs.metric import CLASSIFICATION, Metric
from syncbn.trainer.runs.options import LONGEST, RunConfig, is_legal

# Sections and keys that do not shape what is learnt: two configs that differ in them alone are one run.
OUTSIDE = (
    "run",
    "wandb",
    "launch",
    "drift",
    "eval",
    "checkpoint",
    "task.mode",
    "data.root",
    "data.download",
    "data.workers",
    "data.cache",
    "train.log_every",
)
# Keys whose value is a mapping of any names: what it holds more is no newer key, but another value
MAPPINGS = ("model.options", "optim.lr_factors")


class RunFolder:
    """Paths of a run. It is made by `create`, once everything that could refuse has had its say."""

    def __init__(self, config: RunConfig):
        assert config.name, "a run is named before it has a folder"
        self.overwrite = config.overwrite
        self.path = Path(config.root) / config.name
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"
        self.metric_names = self.path / "metric_names.json"
        self.report = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"
        self.logs = self.path / "logs"
        self.status = self.path / status_file.NAME
        self.lock = self.path / lock.NAME

    def refuse_other(self, config: dict[str, Any]) -> None:
        """Raise if the folder holds a run of another config (unless it may be replaced), or no run at all."""
        self.refuse_elsewhere()
        if not self.path.exists() or all(e == self.lock or e.name.endswith(BESIDE) for e in self.path.iterdir()):
            return
        if not self.config.is_file():
            raise UserError(f"{self.path} exists and is no run (it has no config.yaml): choose another run.name=")
        if self.overwrite:
            return
        changes = differences(redacted(yaml.safe_load(self.config.read_text())), redacted(config))
        if changes:
            raise UserError(
                f"{self.path} holds a run with another config ({', '.join(changes)}): "
                "choose another run.name=, or run.overwrite=true replaces it"
            )

    def holds(self, config: dict[str, Any]) -> bool:
        """Whether there is a run of this config in it."""
        return self.config.is_file() and not differences(yaml.safe_load(self.config.read_text()), redacted(config))

    def finished(self, config: dict[str, Any]) -> bool:
        """Whether a run of this config has come to its end in it."""
        return self.result.is_file() and self.holds(config)

    def create(self, config: dict[str, Any]) -> None:
        """Make the folder anew, with the config in it but for secrets; what attempts at the same run told is kept."""
        self.refuse_elsewhere()
        stays = [self.config, self.lock, *([self.logs, self.status] if self.holds(config) else [])]
        self.path.mkdir(parents=True, exist_ok=True)
        # First, so that it is a run's folder at every moment
        with put_file(self.config) as file:
            file.write(yaml.safe_dump(redacted(config), sort_keys=False).encode())
        for entry in self.path.iterdir():
            if entry in stays:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        self.checkpoints.mkdir()
        self.logs.mkdir(exist_ok=True)

    def name_metrics(self, metrics: Sequence[Metric]) -> None:
        """Write down how people read the metrics of the run. Raises OSError."""
        text = json.dumps([asdict(metric) for metric in metrics], indent=1) + "\n"
        if not self.metric_names.is_file() or self.metric_names.read_text() != text:
            with put_file(self.metric_names) as file:
                file.write(text.encode())

    def write_result(self, result: dict[str, Any]) -> None:
        """Write down what the run came to, after which it is finished for good. Raises OSError."""
        with put_file(self.result) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")

    def named_metrics(self) -> tuple[Metric, ...]:
        """The metrics that were written down; those of classification where none were."""
        try:
            return tuple(Metric(**metric) for metric in json.loads(self.metric_names.read_text()))
        except (OSError, ValueError, TypeError):
            return CLASSIFICATION

    def go_on(self) -> None:
        """Remove what a process was writing when it was killed: another may never write that file."""
        for folder in self.path, self.checkpoints, self.pictures:
            for path in folder.glob(f"*{BESIDE}"):
                path.unlink()

    def unlock(self) -> None:
        """Remove the lock that a job has left which was killed at its very end."""
        lock.clear(self.path)

    def refuse_elsewhere(self) -> None:
        """Raise if what lies at the folder's path is a link: what is written and removed there would be elsewhere."""
        if self.path.is_symlink():
            raise UserError(
                f"{self.path} is a link to {self.path.readlink()}: choose another run.name=, or run.root= as its place"
            )

    def refuse_unwritable(self) -> None:
        """Raise if this process may not write there: in a container, most often, a mount that belongs to another."""
        place = next(p for p in (self.path, *self.path.parents) if os.path.exists(p))  # False where none may look
        if os.access(place, os.W_OK | os.X_OK) or not place.is_dir():
            return
        if os.statvfs(place).f_flag & os.ST_RDONLY:
            raise UserError(f"{place.absolute()} is read-only: mount it for writing, or give another run.root=")
        owner, user = place.stat().st_uid, os.geteuid()
        raise UserError(
            f"{place.absolute()} belongs to user {owner}, and user {user} may not write there: chown {user} it, "
            f"run as its owner (docker run --user {owner}), or give another run.root="
        )


def name_of(config: dict[str, Any], experiment: str | None, overrides: Sequence[str]) -> str:
    """A run's name from what was chosen: experiment or data set, model, norm, batch, other overrides, seed.

    It is one folder's name whatever was chosen: what cannot stand in one is replaced, and what is too long is cut and
    told by a hash.
    """
    named = ("experiment", "data", "data.name", "model.name", "norm", "norm.name", "data.batch_per_rank", "seed")
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
        if key not in named and not _outside(key):
            parts.append(redacted(f"{key}_{value}"))
    return legal("-".join([*parts, f"seed{config['seed']}"]))


def name_of_sweep(words: Sequence[tuple[str, str]], swept: Collection[str]) -> str:
    """A sweep's name, "sweep-" and its words, but for those that shape no run unless they are swept.

    words: key and value of each. What a shell would read as more than a letter is replaced, and told by a hash.
    """
    parts = [
        redacted(f"{key}_{value}") for key, value in sorted(dict(words).items()) if key in swept or not _outside(key)
    ]
    whole = "-".join(["sweep", *parts])
    plain = re.sub(r"[^\w.,+-]", "_", whole)
    return legal(plain if plain == whole else f"{plain[:LONGEST]}-{digest(whole)}")


def digest(text: str, size: int = 4) -> str:
    """A hash of the text, of so many bytes."""
    return blake2b(text.encode(errors="surrogatepass"), digest_size=size).hexdigest()


def legal(name: str) -> str:
    """The name, or one made of it that a folder can have and that another name does not have."""
    made = name.replace("/", "_")  # as in model.weights=a/b.pt
    if is_legal(made):
        return made
    suffix = f"-{digest(name)}"
    made = "".join(c if c.isprintable() else "_" for c in made).lstrip(".")
    return made.encode()[: LONGEST - len(suffix)].decode(errors="ignore") + suffix


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What shapes the training and differs: "optim.lr 0.1 -> 0.2" each. A key that is newer than old is left out."""
    before, after = (flat(config, whole=MAPPINGS) for config in (old, new))
    keys = [key for key in before or after if not _outside(key) and before.get(key) != after.get(key)]
    return [f"{key} {before.get(key)} -> {after.get(key)}" for key in keys]


def _outside(key: str) -> bool:
    return any(key == part or key.startswith(part + ".") for part in OUTSIDE)
