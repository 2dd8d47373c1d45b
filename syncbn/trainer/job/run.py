"""One run on one rank: build everything from the config, train, and leave one folder behind."""

import logging
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.trainer import data, models, norms, tasks, world
from syncbn.trainer.config import Config, as_dict, from_yaml
from syncbn.trainer.errors import FAILED, INCOMPLETE, PREEMPTED, USER_ERROR, UserError, one_line
from syncbn.trainer.job import batch_size
from syncbn.trainer.job import evaluate as evaluation
from syncbn.trainer.job.agreement import alike, refuse_other_data
from syncbn.trainer.job.diagnosis import LostRank, explained
from syncbn.trainer.job.rank0 import Parts, Watch
from syncbn.trainer.redact import RedactingFormatter, redacted
from syncbn.trainer.runs import lock
from syncbn.trainer.runs.folder import RunFolder
from syncbn.trainer.training import cuda_graph, drift, optim, resume
from syncbn.trainer.training.bad_steps import Guard
from syncbn.trainer.training.ema import Average
from syncbn.trainer.training.loop import fit, settle_buckets
from syncbn.trainer.training.preemption import Preempted, Stop
from syncbn.trainer.training.resume import Keeper, Start
from syncbn.trainer.training.state import Training, seed_generators
from syncbn.trainer.training.totals import Totals
from syncbn.trainer.world import World

# Files beside the config that was handed over, for the launcher: rank 0's exit code, and why each rank ended
EXIT_CODE, REASON = "exit_code", "reason"

log = logging.getLogger(__name__)


def run(config: Config, ranks: World) -> int:
    """Do what the config says: the exit code. Collective: with the same config."""
    return evaluate(config, ranks) if config.task.mode == "evaluate" else train_on(config, ranks)


def evaluate(config: Config, ranks: World) -> int:
    """Evaluate a checkpoint and show its figures: the exit code. Collective."""
    log_to(None, warn=ranks.rank == 0)
    needed = evaluation.needed(config)
    norms.refuse_misfit(needed.norm, ranks.size)
    start = resume.find_at(Path(config.checkpoint.resume), ranks)
    with ranks.together():
        parts = build(needed, ranks, start if config.eval.recalibrate else None)
        evaluation.take_over(parts, start, config)
    refuse_other_data(parts.data, ranks)
    evaluation.show(parts, start, config, ranks)
    return ranks.from_rank_0(0)


def train_on(config: Config, ranks: World) -> int:
    """Train as the config says, from where the run was left: the exit code. Collective."""
    norms.refuse_misfit(config.norm, ranks.size)
    stop = Stop(ranks)
    stop.listen()
    folder, settings = RunFolder(config.run), as_dict(config)
    with ExitStack() as until_left:
        with ranks.together():
            if ranks.rank == 0:
                folder.refuse_other(settings)  # before anything is written there
                until_left.enter_context(lock.held(folder.path, longest_s=ranks.timeout_s / 2))
                folder.refuse_other(settings)
        code = train_in(folder, settings, config, ranks, stop)
    # Rank 0 has a report to write, and W&B to wait for
    return int(world.word_of_rank_0(str(code), patience_s=600) or FAILED)


def train_in(folder: RunFolder, settings: dict[str, Any], config: Config, ranks: World, stop: Stop) -> int:
    """Train in a folder that is this job's own: the exit code, which rank 0's is. Collective."""
    start = resume.find(config.checkpoint.resume, folder, settings, ranks)
    kept = start and start.global_batch
    found = found_out(config, ranks) if config.data.batch_per_rank == data.AUTO and not kept else None
    with ranks.together():
        parts = build(config, ranks, start, found)
        if start:
            start.refuse_changed(parts.data)
    refuse_other_data(parts.data, ranks)
    training = assemble(parts, config, ranks)
    with ranks.together():
        if ranks.rank == 0:
            folder.go_on() if start and start.own else folder.create(settings)
    log_to(folder.logs / f"rank{ranks.rank}.log", warn=ranks.rank == 0)
    training.drift = drift.monitor(parts.model, config.drift, expected=norms.NORMS[config.norm.name].running)
    training.recalibrate = config.eval.recalibrate
    training.desync = syncbn.DesyncMonitor(parts.model, patience_s=config.launch.timeout_s / 2, fingerprints=False)
    if start:
        settle_buckets(training, config.train, ranks)
        with ranks.together():
            start.take_up(training, ranks, seed=config.seed)
    watch = Watch(folder, config, ranks, parts, training, start and start.watch) if ranks.rank == 0 else None
    return train(training, config, ranks, watch, stop)


def train(training: Training, config: Config, ranks: World, watch: Watch | None, stop: Stop) -> int:
    """Train to the end, or until it is asked to end: the exit code, which rank 0's is. Collective."""
    keeper = Keeper(ranks, watch)
    try:
        intervals = {"save_every": config.checkpoint.every, "drift_every": config.drift.every}
        fit(training, config.train, ranks, watch, keeper, **intervals, stop=stop)
    except Preempted:
        if watch:
            watch.preempted(training.step)
        return PREEMPTED
    except BaseException as error:
        told = explained(error, training, config, ranks.rank)
        if watch:
            watch.give_up(told)
        if told is error:
            raise
        raise told from error
    finally:
        if training.desync:
            training.desync.close()
    if watch:
        watch.finish(training.figures)
    if watch and watch.missing:
        print(f"error: {watch.incomplete()}", file=sys.stderr, flush=True)
        return INCOMPLETE
    return 0


def found_out(config: Config, ranks: World) -> int:
    """The global batch that data.batch_per_rank=auto comes to on these ranks. Collective."""
    alone = replace(
        config,
        data=replace(config.data, batch_per_rank=1),
        norm=norms.of_one_rank(config.norm),
        train=replace(config.train, cuda_graph=False),
    )
    with ranks.together():
        parts = build(alone, ranks)
    found = batch_size.batch_per_rank(parts, config, ranks)
    if ranks.rank == 0:
        print(f"data.batch_per_rank=auto: {found}", flush=True)
    return found.batch_per_rank * ranks.size


def build(config: Config, ranks: World, start: Start | None = None, found: int | None = None) -> Parts:
    """Data, model and task. No rank speaks to another here. found: by found_out; of a start, its own is kept."""
    if config.train.cuda_graph:
        cuda_graph.prepare(ranks.device)
    seed_generators(config.seed)
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    images = data.build(
        config.data,
        ranks,
        seed=config.seed,
        accumulate=config.train.accumulate,
        memory_format=memory_format,
        global_batch=(start and start.global_batch) or found,
        start=start.state["step"] if start else 0,
    )
    notes = [*images.notes]
    model = models.build(config.model, len(images.classes), notes.append).to(ranks.device)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    place = norms.Place(ranks.device, ranks.size, world.local_size(), images.global_batch)
    model, converted = norms.convert(model, config.norm, place)
    return Parts(images, model, converted, tasks.build(config.task, len(images.classes)), notes)


def assemble(parts: Parts, config: Config, ranks: World) -> Training:
    """The parts joined over the ranks. Collective."""
    average = Average(parts.model, config.train.ema) if config.train.ema else None
    if config.train.compile:
        parts.model.compile(fullgraph=True)
    if not any(parameter.requires_grad for parameter in parts.model.parameters()):
        raise UserError(
            f"model.name={config.model.name} has no parameter to train (requires_grad is False for all, if there are "
            "any): leave some to train, or take task=evaluate",
            on_every_rank=True,
        )
    model = DistributedDataParallel(
        parts.model,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=config.train.find_unused_parameters,
        # Synchronised statistics are the same everywhere; those of other norms follow rank 0, as DDP's default has it
        **{world.BROADCAST_BUFFERS: not norms.synchronised(parts.model)},  # pyright: ignore[reportArgumentType]
    )
    seed_generators(config.seed + ranks.rank)  # from here on only dropout and its like draw from it
    optimizer = optim.build(config.optim, parts.model, parts.data.global_batch * config.train.accumulate)
    steps_per_epoch = parts.data.steps_per_epoch
    steps = config.train.total_steps(steps_per_epoch)
    schedule = optim.build_schedule(config.schedule, optimizer, steps=steps, steps_per_epoch=steps_per_epoch)
    guard = Guard(parts.model, optimizer, scaled=config.train.precision == "fp16")
    totals = Totals(parts.task.sums(), ranks)
    return Training(model, parts.task, parts.data, optimizer, schedule, guard, totals, average)


def log_to(path: Path | None, *, warn: bool) -> None:
    """Send this rank's log and warnings to a file, if any, and rank 0's warnings to stderr as well."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)  # of a node that does not see rank 0's disk
    file = logging.FileHandler(path) if path else logging.NullHandler()
    file.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [file]
    if warn:
        screen = logging.StreamHandler()
        screen.setLevel(logging.WARNING)
        screen.setFormatter(RedactingFormatter("%(levelname)s: %(message)s"))
        handlers.append(screen)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a full disk would have each line of the log tell so


def as_rank(find_config: Callable[[], Config], launcher: int | None = None, reason: Path | None = None) -> int:
    """Be one rank of a run: its exit code. A UserError is one line, told by one rank; so is a traceback.

    launcher: the pid of the process that started it, if it is known.
    reason: where the line is written for the launcher to tell, and that of another error; none: it goes to stderr.
    """
    world.end_with_launcher(launcher)
    world.print_any_text()
    try:
        config = alike(find_config)
        code = run(config, world.join(config.launch, world.meet()))
    except UserError as error:
        told = world.rank() > 0 and error.on_every_rank
        if not told:
            world.first_failure(redacted(f"{error}"))
            if not (reason and _written(reason, f"{error}")):
                print(redacted(f"error: {error}"), file=sys.stderr, flush=True)
        if error.on_every_rank:
            world.word_of_rank_0("", patience_s=30)
        return USER_ERROR
    except Exception as error:
        log.info("rank %d failed", world.rank(), exc_info=True)
        if isinstance(error, LostRank):
            print(redacted(f"rank {world.rank()} lost another: {error}"), file=sys.stderr, flush=True)
        else:
            _tell(error, reason)
        return FAILED
    world.leave()
    return code


def _tell(error: Exception, reason: Path | None) -> None:
    """Print an error that nobody foresaw, as the first rank with its traceback, else in a line if it is another."""
    line = one_line("; ".join("".join(traceback.format_exception_only(error)).strip().splitlines()))
    first, said = world.first_failure(redacted(line))
    if first == world.rank():
        print(redacted(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        if not (reason and _written(reason, line)):
            print(redacted(f"error: rank {first} failed: {line}"), file=sys.stderr, flush=True)
    elif redacted(line) != said:
        print(redacted(f"rank {world.rank()} failed after rank {first}: {line}"), file=sys.stderr, flush=True)


def _written(path: Path, line: str) -> bool:
    with suppress(OSError):  # a full disk
        path.write_text(redacted(line))
        return True
    return False


def as_started(handed_over: Path, launcher: int) -> int:
    """Be the rank that the environment says, of a run whose config was handed over in a file: its exit code.

    launcher: the pid of the process that started this one.
    """
    world.show_title(f"syncbn: rank {world.rank()} of {world.size()}, {handed_over}")
    world.set_scratch(handed_over.parent)
    reason = handed_over.with_name(f"{REASON}{world.rank()}")
    exit_code = as_rank(lambda: from_yaml(handed_over.read_text()), launcher, reason)
    if world.rank() == 0:
        handed_over.with_name(EXIT_CODE).write_text(str(exit_code))
    return exit_code


if __name__ == "__main__":
    sys.exit(as_started(Path(sys.argv[1]), int(sys.argv[2])))
