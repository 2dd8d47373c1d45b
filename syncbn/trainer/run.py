"""One run on one rank: build everything from the config, train, and leave one folder behind."""

import logging
import re
import sys
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from syncbn.trainer import data, drift, graph, models, norms, optim, tasks, world
from syncbn.trainer.average import Average
from syncbn.trainer.config import Config, as_dict, from_yaml
from syncbn.trainer.errors import UserError
from syncbn.trainer.folder import RunFolder
from syncbn.trainer.loop import NonFiniteLoss, Training, fit
from syncbn.trainer.secrets import RedactingFormatter
from syncbn.trainer.watch import Parts, Watch
from syncbn.trainer.world import World

# DDP's option to send rank 0's buffers before each forward; torch 2.15 renamed it
BROADCAST_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel.__init__).parameters
)
USER_ERROR = 2  # exit code of a rank whose UserError has been printed

log = logging.getLogger(__name__)


def run(config: Config, ranks: World) -> None:
    """Train as the config says. Collective: every rank calls it with the same config."""
    began = time.monotonic()
    folder = RunFolder(config.run)
    with ranks.together():
        if ranks.rank == 0:
            folder.refuse_other(as_dict(config))
        parts = build(config, ranks)
    training = assemble(parts, config, ranks)
    with ranks.together():
        if ranks.rank == 0:
            folder.create(as_dict(config))
    log_to(folder.logs / f"rank{ranks.rank}.log", warn=ranks.rank == 0)
    training.drift, training.recalibrate = drift.monitor(parts.model, config.drift), config.drift.recalibrate
    watch = Watch(folder, config, ranks, parts, training) if ranks.rank == 0 else None
    try:
        figures = fit(training, config.train, ranks, watch)
    except BaseException as error:
        if watch:
            watch.give_up()
        if isinstance(error, NonFiniteLoss):
            raise diverged(error, folder) from error
        if config.train.compile and (broken := graph_break(error)):
            raise broken from error
        raise
    if watch:
        watch.finish(figures, time.monotonic() - began)


def diverged(error: NonFiniteLoss, folder: RunFolder) -> UserError:
    """The error as the user can act on it."""
    saved = folder.checkpoint.exists()
    kept = f"{folder.checkpoint} holds the state of the last evaluation" if saved else "nothing was saved yet"
    mend = "try a lower optim.lr, a longer schedule.warmup_epochs or train.clip_norm=1"
    return UserError(f"{error}: every rank has stopped and {kept}; {mend}", on_every_rank=True)


def graph_break(error: BaseException) -> UserError | None:
    """The error as the user can act on it, if it says that torch.compile cannot make one graph of the model."""
    from torch._dynamo.exc import Unsupported  # takes seconds, and is there already where a model was compiled

    if not isinstance(error, Unsupported):
        return None
    text = str(error)
    frames = re.findall(r'File "(.+)", line (\d+), in .*\n *(.+)', text.partition("from user code")[2])
    where = "at {}:{}, {!r}".format(*frames[-1]) if frames else "somewhere"
    return UserError(
        f"train.compile=true makes one graph of the model, and it breaks {where} ({text.splitlines()[0].rstrip('.')}): "
        "write that without a graph break, or train.compile=false",
        on_every_rank=True,
    )


def build(config: Config, ranks: World) -> Parts:
    """Data, model and task. No rank speaks to another here."""
    if config.train.cuda_graph:
        graph.prepare(ranks.device)
    torch.manual_seed(config.seed)
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    images = data.build(
        config.data, ranks, seed=config.seed, accumulate=config.train.accumulate, memory_format=memory_format
    )
    model = models.build(config.model, len(images.classes)).to(ranks.device)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model, converted = norms.convert(model, config.norm, ranks.device)
    return Parts(images, model, converted, tasks.build(config.task))


def assemble(parts: Parts, config: Config, ranks: World) -> Training:
    """The parts joined over the ranks. Collective."""
    average = Average(parts.model, config.train.ema) if config.train.ema else None
    if config.train.compile:
        parts.model.compile(fullgraph=True)
    model = DistributedDataParallel(
        parts.model,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Synchronised statistics are the same everywhere; those of other norms follow rank 0, as DDP's default has it
        **{BROADCAST_BUFFERS: not norms.synchronised(parts.model)},  # pyright: ignore[reportArgumentType]
    )
    torch.manual_seed(config.seed + ranks.rank)  # from here on only dropout and its like draw from it
    global_batch = config.data.batch_per_rank * ranks.size * config.train.accumulate
    optimizer = optim.build(config.optim, parts.model, global_batch, fused=config.train.cuda_graph or None)
    steps_per_epoch = parts.data.steps_per_epoch
    steps = config.train.total_steps(steps_per_epoch)
    schedule = optim.build_schedule(config.schedule, optimizer, steps=steps, steps_per_epoch=steps_per_epoch)
    return Training(model, parts.task, parts.data, optimizer, schedule, average)


def log_to(path: Path, *, warn: bool) -> None:
    """Send this rank's log and warnings to a file, and rank 0's warnings to stderr as well."""
    file = logging.FileHandler(path)
    file.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [file]
    if warn:
        screen = logging.StreamHandler()
        screen.setLevel(logging.WARNING)
        screen.setFormatter(RedactingFormatter("%(levelname)s: %(message)s"))
        handlers.append(screen)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    logging.captureWarnings(True)


def as_rank(find_config: Callable[[], Config]) -> int:
    """Be one rank of a run: its exit code. A UserError is one line on stderr, printed by one rank."""
    try:
        config = find_config()
        run(config, world.join(config.launch, world.meet()))
    except UserError as error:
        if world.rank() == 0 or not error.on_every_rank:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if error.on_every_rank:
            world.wait_for_word_of_rank_0()
        return USER_ERROR
    except Exception:
        log.exception("rank %d failed", world.rank())
        raise
    world.leave()
    return 0


if __name__ == "__main__":
    sys.exit(as_rank(lambda: from_yaml(Path(sys.argv[1]).read_text())))
