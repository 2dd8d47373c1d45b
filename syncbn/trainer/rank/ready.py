"""What trains, made ready: where the run was left, or at its beginning, with rank 0's eyes on it."""

from typing import NamedTuple

from syncbn.trainer.config import Config, as_dict
from syncbn.trainer.log import log_to
from syncbn.trainer.rank import batch_size
from syncbn.trainer.rank.assemble import assemble, watch_statistics
from syncbn.trainer.rank.build import build_together
from syncbn.trainer.rank.opening import open_watch
from syncbn.trainer.rank.rank0 import Watch
from syncbn.trainer.runs.folder import RunFolder
from syncbn.trainer.training import resume
from syncbn.trainer.training.loop import settle_buckets
from syncbn.trainer.training.state import Training
from syncbn.trainer.world import World


class Ready(NamedTuple):
    """config: with what was to be found out on the ranks. watch: None but on rank 0."""

    config: Config
    training: Training
    watch: Watch | None


def ready(folder: RunFolder, config: Config, ranks: World) -> Ready:
    """Build all that a run needs, and take up what an earlier process left of it. Collective."""
    settings = as_dict(config)
    start = resume.find_start(config.checkpoint.resume, folder, settings, ranks)
    config = batch_size.settled(config, ranks, start)
    parts = build_together(config, ranks, start, lambda parts: start.refuse_changed(parts.data) if start else None)
    training = assemble(parts, config, ranks)
    with ranks.together():
        if ranks.rank == 0:
            folder.go_on() if start and start.own else folder.create(settings)
    log_to(folder.logs / f"rank{ranks.rank}.log", warn=ranks.rank == 0)
    watch_statistics(training, parts, config)
    if start:
        settle_buckets(training, config.train, ranks)
        with ranks.together():
            start.take_up(training, ranks, seed=config.seed)
    if ranks.rank > 0:
        return Ready(config, training, None)
    state = start.watch if start else None
    return Ready(config, training, open_watch(folder, settings, config, ranks, parts, training, state))
