"""One run, on each of its ranks: train from where it was left, and leave one folder behind."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from syncbn.trainer import norms, world
from syncbn.trainer.config import Config, as_dict
from syncbn.trainer.errors import FAILED, PREEMPTED
from syncbn.trainer.rank.diagnosis import explained
from syncbn.trainer.rank.ready import ready
from syncbn.trainer.runs import lock
from syncbn.trainer.runs.folder import RunFolder
from syncbn.trainer.training.loop import fit
from syncbn.trainer.training.preemption import Preempted, Stop
from syncbn.trainer.training.resume import Keeper
from syncbn.trainer.world import World


def train(config: Config, ranks: World) -> int:
    """Train as the config says, from where the run was left: the exit code, which rank 0's is. Collective."""
    norms.refuse_misfit(config.norm, ranks.size)
    stop = Stop(ranks)
    stop.listen()
    folder = RunFolder(config.run)
    with own(folder, config, ranks):
        config, training, watch = ready(folder, config, ranks)
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
