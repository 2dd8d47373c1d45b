"""One run, on each of its ranks: train from where it was left, and leave one folder behind."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import syncbn
from syncbn.trainer import data, norms, world
from syncbn.trainer.config import Config, as_dict
from syncbn.trainer.errors import FAILED, PREEMPTED
from syncbn.trainer.job import batch_size
from syncbn.trainer.job.agreement import refuse_other_data
from syncbn.trainer.job.build import assemble, build
from syncbn.trainer.job.diagnosis import explained
from syncbn.trainer.job.log import log_to
from syncbn.trainer.job.rank0 import Watch
from syncbn.trainer.runs import lock
from syncbn.trainer.runs.folder import RunFolder
from syncbn.trainer.training import drift, resume
from syncbn.trainer.training.loop import fit, settle_buckets
from syncbn.trainer.training.preemption import Preempted, Stop
from syncbn.trainer.training.resume import Keeper
from syncbn.trainer.training.state import Training
from syncbn.trainer.world import World


def train(config: Config, ranks: World) -> int:
    """Train as the config says, from where the run was left: the exit code, which rank 0's is. Collective."""
    norms.refuse_misfit(config.norm, ranks.size)
    stop = Stop(ranks)
    stop.listen()
    folder = RunFolder(config.run)
    with own(folder, config, ranks):
        training, watch = ready(folder, config, ranks)
        intervals = {"save_every": config.checkpoint.every, "drift_every": config.drift.every}
        try:
            fit(training, config.train, ranks, watch, Keeper(ranks, watch), **intervals, stop=stop)
        except Preempted:
            code = PREEMPTED
            if watch:
                watch.preempted(training.step)
        except BaseException as error:
            explanation = explained(error, training, config, ranks.rank)
            if watch:
                watch.give_up(explanation)
            if explanation is error:
                raise
            raise explanation from error
        else:
            code = watch.finish(training.figures) if watch else 0
        finally:
            if training.desync:
                training.desync.close()
    # Rank 0 has a report to write, and W&B to wait for
    return int(world.word_of_rank_0(str(code), patience_s=600) or FAILED)


@contextmanager
def own(folder: RunFolder, config: Config, ranks: World) -> Iterator[None]:
    """A block in which no other job writes into the run's folder. Collective."""
    settings = as_dict(config)
    with ExitStack() as until_left:
        with ranks.together():
            if ranks.rank == 0:
                folder.refuse_other(settings)  # before anything is written there
                until_left.enter_context(lock.held(folder.path, longest_s=ranks.timeout_s / 2))
                folder.refuse_other(settings)
        yield


def ready(folder: RunFolder, config: Config, ranks: World) -> tuple[Training, Watch | None]:
    """What trains, where the run was left or at its beginning, and rank 0's eyes on it. Collective."""
    settings = as_dict(config)
    start = resume.find_start(config.checkpoint.resume, folder, settings, ranks)
    kept = start and start.global_batch
    wanted = config.data.batch_per_rank == data.AUTO and not kept
    auto_batch = batch_size.global_batch(config, ranks) if wanted else None
    with ranks.together():
        parts = build(config, ranks, start, auto_batch)
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
    return training, watch
