"""The doors into a run: one process of a job goes through Hydra, and every rank receives its finished config."""

import json
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from syncbn.trainer import data, models, world
from syncbn.trainer.config import Config, as_dict, explain, from_yaml, on_top_of, register, to_yaml, typed
from syncbn.trainer.errors import FAILED, FINAL, USER_ERROR, Ended, RanksFailed, UserError
from syncbn.trainer.files import clear_scratch, scratch
from syncbn.trainer.job import command_line, ranks, sweep
from syncbn.trainer.job.run import EXIT_CODE, REASON, as_rank
from syncbn.trainer.redact import redacted
from syncbn.trainer.runs import status_file
from syncbn.trainer.runs.folder import RunFolder, name_of
from syncbn.trainer.runs.lock import now
from syncbn.trainer.training import preemption, resume

CONFIG = "syncbn/config"  # the store's key for what rank 0 decided
CHECKPOINT = re.compile(r"^checkpoint=(?!\{)")  # on the command line: short for what is asked for most in its section
SIGNALS = (*preemption.SIGNALS, signal.SIGHUP, signal.SIGQUIT)


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
    if not world.under_torchrun():
        ranks.prepare_early()
        sys.exit(sweep.to_its_end(lambda: in_one_line(job)))
    store = world.meet()
    if world.rank() > 0:
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
        sys.exit(code)
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
        print(f"{folder.path} is finished: its figures are in {folder.result}; checkpoint.resume=none trains it anew")
        return objective(folder)
    on_its_ranks(config)
    return objective(folder)


def one_evaluation(composed: DictConfig) -> float:
    """Evaluate the checkpoint of the config, by its own config with the command line's words on top."""
    path = Path(composed.checkpoint.resume)
    if str(path) in ("auto", "none", "."):
        raise UserError("task=evaluate evaluates a checkpoint: give checkpoint=FILE, or a run's folder, runs/NAME")
    path, state = resume.load(path)
    config = on_top_of(state["config"], list(HydraConfig.get().overrides.task), path)
    with scratch() as folder:
        run = replace(config.run, root=str(folder))
        config = replace(config, run=run, launch=replace(config.launch, max_restarts=0))
        on_its_ranks(config)
        return objective(RunFolder(run))


def on_its_ranks(config: Config) -> None:
    """Run the config: as rank 0 under torchrun, else on ranks started here."""
    if world.under_torchrun():
        world.meet().set(CONFIG, json.dumps({"config": to_yaml(config)}))
        if code := as_rank(lambda: config):
            sys.exit(code)  # it has said why
    else:
        refuse_missing(config)
        start_ranks_again(config)


def refuse_missing(config: Config) -> None:
    """Raise UserError for a file or folder that is not there: the ranks would, but take seconds to start."""
    data.refuse_missing(config.data)
    if config.task.mode == "train":
        models.refuse_missing(config.model)
        resume.refuse_missing(config.checkpoint.resume, RunFolder(config.run), as_dict(config))


def objective(folder: RunFolder) -> float:
    """What a sweep compares runs by."""
    return json.loads(folder.result.read_text())["objective"]


def start_ranks_again(config: Config) -> None:
    """Run the config on ranks of this machine, and on new ones when one of them died, as often as it says.

    Not after what another try would not change, nor after a preemption.
    """
    for restart in range(config.launch.max_restarts + 1):
        try:
            start_ranks(config)
            return
        except RanksFailed as failed:
            if isinstance(failed, Ended) or failed.exit_code in FINAL or restart == config.launch.max_restarts:
                raise
            number = f"restart {restart + 1} of {config.launch.max_restarts}"
            print(f"{failed}: all ranks start again from the last checkpoint ({number})", file=sys.stderr, flush=True)
        if config.checkpoint.resume == "none":  # anew, but once
            config = replace(config, checkpoint=replace(config.checkpoint, resume="auto"))


def start_ranks(config: Config) -> None:
    """Run the config on ranks of this machine."""
    world.refuse_without_loopback()
    nproc, began = world.ranks_to_start(config.launch), now()
    world.set_rank_environment(config.launch, nproc)
    on_cpus = world.choose_device(config.launch).type == "cpu"
    with scratch() as folder:
        handed_over = folder / "config.yaml"
        handed_over.write_text(to_yaml(config))
        ends = ranks.run_ranks(str(handed_over), nproc, signals_to_pass_on(), forked=on_cpus and ranks.CAN_FORK)
        if ends.signalled is not None:
            told = handed_over.with_name(EXIT_CODE)
            code = int(told.read_text()) if told.exists() else 128 + ends.signalled
            if code != 0:  # else they had come to the end of the run already
                raise Ended(f"ended by {ends.signalled.name}", code, said(handed_over, *range(nproc)))
        elif failed := {rank: code for rank, code in ends.exit_codes.items() if code}:
            told = [rank for rank in failed if said(handed_over, rank)]
            rank, code = to_blame(failed, told, ends.stopped)
            reason = said(handed_over, *(range(nproc) if code == USER_ERROR else [rank]))
            out_of_memory = ends.out_of_memory and rank not in ends.stopped
            end = "failed" if rank in told else _end(code, out_of_memory)
            error = RanksFailed(f"rank {rank} {end}", code, reason)
            status_file.blame(RunFolder(config.run).status, rank, reason or str(error), sure=bool(reason), since=began)
            raise error


def said(handed_over: Path, *ranks: int) -> str:
    """Why the ranks ended, by their own words, each told once."""
    files = [handed_over.with_name(f"{REASON}{rank}") for rank in ranks]
    return "; ".join(dict.fromkeys(file.read_text() for file in files if file.exists()))


def signals_to_pass_on() -> list[signal.Signals]:
    """The signals that the ranks are to have from this process, but for those that whoever runs it answers or ignores.

    submitit answers some to queue a job again (and Slurm sends them to the job's ranks, too); nohup ignores SIGHUP.
    """
    own = (signal.SIG_DFL, signal.default_int_handler)
    return [number for number in SIGNALS if signal.getsignal(number) in own]


def to_blame(exit_codes: dict[int, int], told: Collection[int] = (), stopped: Collection[int] = ()) -> tuple[int, int]:
    """The rank that the others fell with, and its exit code.

    One whose exit code says why, else one that was killed, else one that told why; and, of none, one that had ended
    before this process stopped the others. told, stopped: ranks.
    """

    def likely(rank: int) -> tuple[bool, ...]:
        code = exit_codes[rank]
        killed = code < 0 and code != -signal.SIGTERM and rank not in stopped
        return code in FINAL, killed, rank in told, rank not in stopped

    rank = max(exit_codes, key=likely)
    return rank, exit_codes[rank]


def named(config: Config) -> Config:
    """The config with its run's name filled in."""
    if config.run.name is not None:
        return config
    hydra = HydraConfig.get()
    name = name_of(as_dict(config), hydra.runtime.choices.get("experiment"), list(hydra.overrides.task))
    return replace(config, run=replace(config.run, name=name))


def in_one_line(job: Callable[[], Any]) -> int:
    """Run job; an error of the user's is told in one line. Returns the exit code."""
    world.print_any_text()
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
    command = shlex.join(["python", sys.argv[0], "-m", *overrides, f"launch.nproc={world.local_size()}"])
    raise UserError(f"-m starts a job per point and cannot do so inside torchrun; run: {command}")


def _end(exit_code: int, out_of_memory: bool) -> str:
    if exit_code == -signal.SIGKILL and out_of_memory:
        return "was ended by SIGKILL, the kernel's, as memory ran out: lower data.batch_per_rank or data.workers"
    return f"was ended by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"failed with exit code {exit_code}"
