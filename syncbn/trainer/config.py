"""The whole config: every section's dataclass gathered into one schema, and errors in it told in one line."""

import difflib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.trainer.data import DataConfig
from syncbn.trainer.display.wandb_run import WandbConfig
from syncbn.trainer.environment import LaunchConfig
from syncbn.trainer.errors import UserError
from syncbn.trainer.models import ModelConfig
from syncbn.trainer.norms import NormConfig
from syncbn.trainer.option import flat, option
from syncbn.trainer.runs.options import CheckpointConfig, RunConfig
from syncbn.trainer.tasks import TaskConfig
from syncbn.trainer.training.drift import DriftConfig
from syncbn.trainer.training.optim import OptimConfig, ScheduleConfig
from syncbn.trainer.training.options import EvalConfig, TrainConfig

# What an extra of pyproject.toml brings, and the extra
EXTRAS = {
    "hydra/launcher=joblib": "sweep",
    "hydra/sweeper=optuna": "sweep",
    "hydra/sweeper/sampler": "sweep",
    "hydra/launcher=submitit": "slurm",
}


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = option(0, "of weights, shuffles and augmentation")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        self.data.root, self.run.root, self.checkpoint.resume = (
            os.path.expanduser(path) for path in (self.data.root, self.run.root, self.checkpoint.resume)
        )
        self.model.weights, self.model.backbone_weights = (
            path and os.path.expanduser(path) for path in (self.model.weights, self.model.backbone_weights)
        )
        for key, value in flat(asdict(self)).items():
            for each in value if isinstance(value, list) else [value]:
                check_value(key, each)
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: give 0 or more")
        if self.train.cuda_graph and self.data.skip_broken:
            raise UserError(
                "train.cuda_graph=true with data.skip_broken=true: a graph takes batches of one shape, and an image "
                "left out makes a smaller one; choose one of the two"
            )


def check_value(key: str, value: Any) -> None:
    """Raise UserError for what no key can mean, so that the sections look only at what is particular to theirs."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value}: give a finite number")
    if isinstance(value, int) and abs(value) >= 2**53:
        raise UserError(f"{key}={value}: give a number below 2**53, as JSON's readers take")
    if isinstance(value, str) and not value.isprintable():
        raise UserError(f"{key}={value}: give a text without line breaks and control characters")


def register() -> None:
    """Make the schema known to Hydra: conf/config.yaml is checked against it, and --help lists its keys."""
    ConfigStore.instance().store("schema", Config)
    OmegaConf.register_new_resolver("keys", lambda: "\n".join(described(Config())), replace=True)


def typed(config: DictConfig | dict[str, Any]) -> Config:
    """The config as dataclasses. Raises UserError for an unknown key, a wrong type or a value out of range."""
    try:
        # As plain values: a composed config remembers that + opened it for any key
        plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        typed: Config = OmegaConf.to_object(merged)  # pyright: ignore[reportAssignmentType]
        OmegaConf.structured(typed)  # merge does not look at the types in lists
        return typed
    except UserError:
        raise
    except Exception as error:  # OmegaConf meets some values with errors that are not its own
        raise UserError(explain(error)) from error


def on_top_of(earlier: dict[str, Any], overrides: list[str], path: Path) -> Config:
    """The config of an earlier run, found at path, with the command line's words on top. Only inside @hydra.main.

    A choice (data=cifar10) sets the keys that its file has, and leaves the others as they were. Raises UserError.
    """
    groups = [group for group in HydraConfig.get().runtime.choices if not group.startswith("hydra/")]
    defaults = ["schema", "_self_", *({group: None} for group in sorted(groups, key="experiment".__eq__))]
    ConfigStore.instance().store("earlier", {"defaults": defaults, **earlier})
    try:
        composed = compose("earlier", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"the config in {path} is not of this version ({explain(error)})") from None
    return typed(composed)


def to_yaml(config: Config) -> str:
    """The config as it is handed to the ranks and kept in config.yaml."""
    return yaml.safe_dump(as_dict(config), sort_keys=False)


def from_yaml(text: str) -> Config:
    return typed(OmegaConf.create(text))  # pyright: ignore[reportArgumentType]


def as_dict(config: Config) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.structured(config))  # pyright: ignore[reportReturnType]


def described(section: Any, prefix: str = "") -> Iterator[str]:
    """A line for each key: its name, its default, and its help."""
    for key in fields(section):
        name, value = key.name, getattr(section, key.name)
        if is_dataclass(value):
            yield from described(value, f"{prefix}{name}.")
        else:
            default = json.dumps(value).replace(" ", "").strip('"')
            yield f"{f'{prefix}{name}={default}':<36} {key.metadata.get('help', '')}".rstrip()


def explain(error: Exception) -> str:
    """What is wrong with an override or a config file, in one line that names the mend."""
    below = error.__cause__
    text = f"{error}\n{below}" if isinstance(below, HydraException | OmegaConfBaseException) else str(error)
    text = text.strip() or type(error).__name__
    listed = r"Could not find '([^']+)/([^'/]+)'.*?Available options in '[^']+':(.*?)(?:\nConfig search path|$)"
    if missing := re.search(listed, text, re.S):
        group, choice, options = missing.groups()
        for asked, extra in EXTRAS.items():
            if f"{group}={choice}".startswith(asked):
                return f"{asked} is not installed: pip install -e '.[{extra}]'"
        return f"{group}={choice}: no such choice; choose one of {', '.join(options.split())}"
    full_key = re.search(r"full_key: (\S+)", text)
    if re.search(r"Key '[^']+' (is )?not in", text) and full_key:
        return unknown_key(full_key[1])
    if group := re.search(r"Could not override '([^']+)'\.?\s+No match in the defaults list", text):
        return unknown_key(group[1])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = next((line for line in lines if re.match(r"Value|Cannot|Invalid|Incompatible", line)), lines[0])
    return f"{full_key[1]}: {cause}" if full_key else cause


def unknown_key(key: str) -> str:
    """What to say of a key that there is not, with the one that was meant, if that can be told."""
    if near := _near(key):
        hint = f"did you mean {' or '.join(near)}?"
    else:
        siblings = [other for other in KEYS if other.rpartition(".")[0] == key.rpartition(".")[0]]
        hint = f"there are {', '.join(siblings or dict.fromkeys(other.split('.')[0] for other in KEYS))}"
    return f"{key}: no such key; {hint} (python train.py --help lists all)"


def _near(key: str) -> list[str]:
    """The keys that it may stand for: that begin so, that end so (lr, learning.lr), or that look like it."""
    section, _, last = key.rpartition(".")
    if begin := [other for other in KEYS if other.startswith(key)]:
        return begin[:1]
    within = [other for other in KEYS if section and other.startswith(f"{section}.")]
    if near := difflib.get_close_matches(key, within, n=1):
        return near
    if same := [other for other in KEYS if other.split(".")[-1] == last]:
        return difflib.get_close_matches(key, same, n=1, cutoff=0.0) if section else same[:3]
    by_last = {other.split(".")[-1]: other for other in KEYS}
    return difflib.get_close_matches(key, KEYS, n=1) or [
        by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)
    ]


def _keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict) or not node:
        return [prefix]
    return [key for name, value in node.items() for key in _keys(value, f"{prefix}.{name}".lstrip("."))]


KEYS = _keys(OmegaConf.to_container(OmegaConf.structured(Config)))
LISTS = [key for key, value in flat(asdict(Config())).items() if isinstance(value, list)]
