"""What a sweep is to do: its points, made of the command line's words, and refused before the first of them begins."""

import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from syncbn.trainer import tasks
from syncbn.trainer.config import Config, as_dict, typed
from syncbn.trainer.errors import UserError
from syncbn.trainer.runs.folder import name_of, name_of_sweep
from syncbn.trainer.runs.metric import Metric, headline
from syncbn.trainer.runs.sweep_folder import SEED, Point, Sweep

# What we have a sweeper do that has such settings, as Optuna's has
OF_SWEEPERS = {
    "sweeper.max_failure_rate": 1.0,  # a failed point is no end
    "sweeper.sampler.seed": 0,  # the same command draws the same points, and so goes on
}


def planned(config: DictConfig) -> tuple[Sweep, str]:
    """The sweep that a sweep's own config asks for, and its folder's name.

    Raises UserError, and Hydra's errors for a key or choice that there is not.
    """
    hydra = config.hydra
    basic = hydra.runtime.choices["hydra/sweeper"] == "basic"
    overrides = _overrides(hydra)
    swept = [_key(override) for override in overrides if override.is_sweep_override()]
    if basic:
        _refuse_unswept(overrides)
    chosen = list(itertools.product(*(_words(override, all_of=basic) for override in overrides)))
    composed = [_composed(config, each) for each in chosen]
    made = [Point(choices(each, swept), run=name) for each, (name, _) in zip(chosen, composed, strict=True)]
    _refuse_twice(made)
    judged_by = [headline(tasks.build(point.task).metrics) for _, point in composed if point]
    metric = judged_by[0] if judged_by else Metric("objective")
    total = len(made) if basic else OmegaConf.select(hydra, "sweeper.n_trials")
    points = made if basic else []
    sweep = Sweep(swept, total, metric.name, time.time(), points, metric.unit, metric.better)
    return sweep, name_of_sweep([(_key(override), _value(override)) for override in overrides], swept)


def lay_down(hydra: DictConfig, name: str, sweep: Sweep) -> None:
    """Set the sweep's folder, here and for every point, and what its sweeper was not told."""
    direction = "maximize" if sweep.better == "more" else "minimize"
    place = f"${{run.root}}/{name}"
    given = [word.partition("=")[0] for word in hydra.overrides.hydra]
    with read_write(hydra), open_dict(hydra):
        hydra.sweep.dir = place
        hydra.overrides.hydra.append(f"hydra.sweep.dir='{place}'")
        for key, value in {"sweeper.direction": direction, **OF_SWEEPERS}.items():
            section, _, own = key.rpartition(".")
            if own in (OmegaConf.select(hydra, section) or {}) and f"hydra.{key}" not in given:
                OmegaConf.update(hydra, key, value)
    logging.getLogger("hydra_plugins").setLevel(logging.ERROR)  # what fails is told by its point


def task_words(hydra: Any) -> list[str]:
    """The words that are not Hydra's own, as they were written: an interpolation is that of each point."""
    return OmegaConf.to_container(hydra.overrides.task, resolve=False)  # pyright: ignore[reportReturnType]


def choices(chosen: Sequence[str], swept: Sequence[str]) -> dict[str, str]:
    """{swept key: its value} of a point's words, in the sweep's order."""
    parts = [word.lstrip("+").partition("=") for word in chosen]
    pairs = {key: value for key, _, value in parts}
    return {key: pairs[key] for key in swept if key in pairs}


def run_name(config: Config, hydra: Any) -> str | None:
    if config.task.mode == "evaluate":
        return None
    experiment = hydra.runtime.choices.get("experiment")
    return config.run.name or name_of(as_dict(config), experiment, list(hydra.overrides.task))


def _overrides(hydra: DictConfig) -> list[Override]:
    """What the sweep was given, the last word on each key."""
    params = OmegaConf.select(hydra, "sweeper.params") or {}
    given = [*(f"{key}={value}" for key, value in params.items()), *task_words(hydra)]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    return list({override.get_key_element(): override for override in parser.parse_overrides(given)}.values())


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+")


def _value(override: Override) -> str:
    return override.get_value_string() if "=" in (override.input_line or "") else ""


def _words(override: Override, *, all_of: bool) -> list[str]:
    """The words for a point that it can become, in the order and the spelling of Hydra's sweeper; or one of them."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if override.is_discrete_sweep():
        words = [f"{key}={value}" for value in override.sweep_string_iterator()]
        return words if all_of else words[:1]
    interval = override.value()
    assert isinstance(interval, IntervalSweep)
    return [f"{key}={interval.start}"]


def _composed(config: DictConfig, chosen: Sequence[str]) -> tuple[str | None, Config | None]:
    """The name of a point's run, and its config; None: it will be refused, or makes no run."""
    words = [*config.hydra.overrides.hydra, *chosen]
    composed = compose(config.hydra.job.config_name, words, return_hydra_config=True)
    hydra = composed.hydra
    with read_write(composed), open_dict(composed):
        del composed["hydra"]
    try:
        point = typed(composed)
    except UserError:
        return None, None
    return run_name(point, hydra), point


def _refuse_unswept(overrides: Sequence[Override]) -> None:
    swept = [override for override in overrides if override.is_sweep_override()]
    if not swept:
        raise UserError(
            "-m runs a job for each of several values, and no key has any: give norm=local,sync, say, or leave -m out"
        )
    for override in swept:
        if not override.is_discrete_sweep():
            line = override.input_line
            raise UserError(
                f"{line}: a range has no end of values to try; give some, or hydra/sweeper=optuna, which draws them"
            )
        if _key(override).startswith("run.root"):
            raise UserError(f"{override.input_line}: a sweep has one folder for all of its runs; give one run.root=")


def _refuse_twice(made: Sequence[Point]) -> None:
    """Raise if two points would be one run."""
    firsts: dict[str, int] = {}
    for i, point in enumerate(made):
        if point.run is None:
            continue
        first = firsts.setdefault(point.run, i)
        if first == i:
            continue
        differ = [key for key, value in point.choices.items() if made[first].choices[key] != value]
        if not differ:
            raise UserError(f"points {first + 1} and {i + 1} are both {point.words}: name each value once")
        parts = "-".join(f"${{{key if '.' in key or key == SEED else f'{key}.name'}}}" for key in differ)
        raise UserError(
            f"points {first + 1} and {i + 1} ({made[first].words}; {point.words}) would be one run, {point.run}: "
            f"give each a name of its own, 'run.name=NAME-{parts}' (in quotes, for the shell)"
        )
