"""One run: its config is finished, refused if it can be at once, and handed to ranks; its objective comes back."""

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from syncbn.trainer import data, environment, models, tasks, world
from syncbn.trainer.config import Config, as_dict, on_top_of, to_yaml, typed
from syncbn.trainer.files import clear_scratch, scratch
from syncbn.trainer.job.start import start_ranks
from syncbn.trainer.rank.life import as_rank
from syncbn.trainer.report import page
from syncbn.trainer.runs.folder import RunFolder, name_of
from syncbn.trainer.training import resume

CONFIG = "syncbn/config"  # the store's key for what rank 0 decided


def one_run(composed: DictConfig) -> float:
    """Do what the config says, on its ranks. Returns the objective."""
    with ExitStack() as until_done:
        if composed.task.mode == "evaluate":
            config = of_checkpoint(composed, until_done.enter_context(scratch()))
        else:
            config = of_run(composed)
        folder = RunFolder(config.run)
        if not is_finished(folder, config):
            refuse_missing(config)
            run_on_ranks = hand_to_ranks if environment.under_torchrun() else start_ranks
            run_on_ranks(config)
        return objective(folder)


def of_run(composed: DictConfig) -> Config:
    """The config of a training, once its folder is known to be its own."""
    config = named(typed(composed))
    folder = RunFolder(config.run)
    folder.refuse_unwritable()
    folder.refuse_other(as_dict(config))
    return config


def of_checkpoint(composed: DictConfig, root: Path) -> Config:
    """That of an evaluation, which leaves its result below root: a checkpoint's own, and the command line on top."""
    path, state = resume.load_to_evaluate(composed.checkpoint.resume)
    config = on_top_of(state["config"], list(HydraConfig.get().overrides.task), path)
    run, launch = replace(config.run, root=str(root)), replace(config.launch, max_restarts=0)
    return replace(config, run=run, launch=launch)


def is_finished(folder: RunFolder, config: Config) -> bool:
    """Whether the run has come to its end already, and is not to be trained anew; then it is told."""
    if config.checkpoint.resume == "none" or not folder.finished(as_dict(config)):
        return False
    # A job may have been killed at its very end, behind the result
    clear_scratch()
    folder.unlock()
    if not folder.report.exists():
        page.write_report(folder.path)
    print(f"{folder.path} is finished: its figures are in {folder.result}; checkpoint.resume=none trains it anew")
    return True


def hand_to_ranks(config: Config) -> None:
    """Under torchrun: give all ranks the config, and be rank 0 of them."""
    world.meet().set(CONFIG, json.dumps({"config": to_yaml(config)}))
    if code := as_rank(lambda: config):
        sys.exit(code)  # it has said why


def refuse_missing(config: Config) -> None:
    """Raise UserError for a file or folder that is not there: the ranks would, but take seconds to start."""
    data.refuse_missing(config.data, tasks.build(config.task).targets)
    if config.task.mode == "train":
        models.refuse_missing(config.model)
        resume.refuse_missing(config.checkpoint.resume, RunFolder(config.run), as_dict(config))


def objective(folder: RunFolder) -> float:
    """What a sweep compares runs by."""
    return json.loads(folder.result.read_text())["objective"]


def named(config: Config) -> Config:
    """The config with its run's name filled in."""
    if config.run.name is not None:
        return config
    hydra = HydraConfig.get()
    name = name_of(as_dict(config), hydra.runtime.choices.get("experiment"), list(hydra.overrides.task))
    return replace(config, run=replace(config.run, name=name))
