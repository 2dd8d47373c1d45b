"""The doors into a run: one process of a job goes through Hydra, and every rank receives its finished config."""

import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from syncbn.trainer import data, environment, models, tasks, world
from syncbn.trainer.config import Config, as_dict, explain, from_yaml, on_top_of, register, to_yaml, typed
from syncbn.trainer.errors import FAILED, FINAL, USER_ERROR, RanksFailed, UserError
from syncbn.trainer.files import clear_scratch, scratch
from syncbn.trainer.job import command_line, ranks, sweep
from syncbn.trainer.job.rank import as_rank
from syncbn.trainer.job.start import start_ranks
from syncbn.trainer.redact import redacted
from syncbn.trainer.runs import lock
from syncbn.trainer.runs.folder import RunFolder, name_of
from syncbn.trainer.training import resume

CONFIG = "syncbn/config"  # the store's key for what rank 0 decided
CHECKPOINT = re.compile(r"^checkpoint=(?!\{)")  # on the command line: short for what is asked for most in its section


class SweepBegins(Callback):
    """Hydra tells it that a sweep begins, before anything else, in the process that was started for it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        try:
            code = in_one_line(lambda: sweep.begin(config))
        except Exception as error:  # no more than a warning, to Hydra
            traceback.print_exception(error)
            code = FAILED
        if code:
            sys.exit(code)


def enter(job: Callable[[], Any]) -> None:
    """Go through the door that this process was started at; job is the script's @hydra.main function.

    Alone: job composes the config and starts the ranks. Under torchrun (or what execs it): rank 0 runs job and
    sends the config over the store; the other ranks wait for it there.
    """
    register()
    try:
        sys.argv[1:] = command_line.understood([CHECKPOINT.sub("checkpoint.resume=", word) for word in sys.argv[1:]])
    except UserError as refused:
        job = _refusing(refused)
    if not environment.under_torchrun():
        ranks.prepare_early()
        sys.exit(sweep.to_its_end(lambda: in_one_line(job)))
    store = world.meet()
    if environment.rank() > 0:
        decided = json.loads(store.get(CONFIG))
        sys.exit(as_rank(lambda: from_yaml(decided["config"])) if decided["config"] else decided["exit_code"])
    try:
        code = in_one_line(_refuse_multirun if {"-m", "--multirun"} & set(sys.argv[1:]) else job)
    except SystemExit as end:
        code = end.code
    if not store.check([CONFIG]):  # refused, or --help and the like: there is no run to wait for
        store.set(CONFIG, json.dumps({"config": None, "exit_code": code}))
    sys.exit(code)


def run_job(composed: DictConfig) -> float | None:
    """The body of the script's @hydra.main function: one run; its objective, for a sweeper, if it came to one."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return sweep.one_point(composed, one_run)
    objective: list[float] = []
    if code := in_one_line(lambda: objective.append(one_run(composed))):
        sys.exit(code)  # of an exception Hydra would tell in lines of its own
    return objective[0]


def one_run(composed: DictConfig) -> float:
    """Do what the config says, on its ranks. Returns the objective."""
    if composed.task.mode == "evaluate":
        return one_evaluation(composed)
    config = named(typed(composed))
    folder = RunFolder(config.run)
    folder.refuse_unwritable()
    folder.refuse_other(as_dict(config))
    if config.checkpoint.resume != "none" and folder.finished(as_dict(config)):
        clear_scratch()  # that of a job killed at its very end
        lock.clear(folder.path)
        print(f"{folder.path} is finished: its figures are in {folder.result}; checkpoint.resume=none trains it anew")
        return objective(folder)
    refuse_missing(config)
    run_on_ranks = hand_to_ranks if environment.under_torchrun() else start_ranks
    run_on_ranks(config)
    return objective(folder)


def one_evaluation(composed: DictConfig) -> float:
    """Evaluate the checkpoint of the config, by its own config with the command line's words on top."""
    path = Path(composed.checkpoint.resume)
    if str(path) in ("auto", "none", "."):
        raise UserError("task=evaluate evaluates a checkpoint: give checkpoint=FILE, or a run's folder, runs/NAME")
    path, state = resume.load_checkpoint(path)
    config = on_top_of(state["config"], list(HydraConfig.get().overrides.task), path)
    with scratch() as folder:
        run = replace(config.run, root=str(folder))
        config = replace(config, run=run, launch=replace(config.launch, max_restarts=0))
        refuse_missing(config)
        run_on_ranks = hand_to_ranks if environment.under_torchrun() else start_ranks
        run_on_ranks(config)
        return objective(RunFolder(run))


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


def in_one_line(job: Callable[[], Any]) -> int:
    """Run job; an error of the user's is told in one line. Returns the exit code."""
    environment.print_any_text()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and we do the telling
    try:
        job()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        text = str(error) if isinstance(error, UserError) else explain(error)
        print(redacted(f"error: {text}"), file=sys.stderr, flush=True)
        return USER_ERROR
    except RanksFailed as error:
        if error.exit_code not in FINAL:
            print(f"error: {error}{f': {error.reason}' if error.reason else ''}", file=sys.stderr, flush=True)
        elif error.reason:
            print(f"error: {error.reason}", file=sys.stderr, flush=True)
        return error.exit_code if error.exit_code > 0 else 1
    return 0


def _refusing(refused: UserError) -> Callable[[], NoReturn]:
    def refuse() -> NoReturn:
        raise refused

    return refuse


def _refuse_multirun() -> NoReturn:
    overrides = [word for word in sys.argv[1:] if word not in ("-m", "--multirun")]
    command = shlex.join(["python", sys.argv[0], "-m", *overrides, f"launch.nproc={environment.local_size()}"])
    raise UserError(f"-m starts a job per point and cannot do so inside torchrun; run: {command}")
