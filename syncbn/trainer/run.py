"""One run on one rank: build everything from the config, train, and leave one folder behind."""

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from syncbn.trainer import checkpoint, data, models, norms, optim, tasks, world
from syncbn.trainer.config import Config, as_dict, from_yaml
from syncbn.trainer.console import Screen
from syncbn.trainer.errors import UserError
from syncbn.trainer.folder import RunFolder
from syncbn.trainer.loop import NonFiniteLoss, Training, fit
from syncbn.trainer.metrics import Record
from syncbn.trainer.tracking import Tracker
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
    watch = Watch(folder, config, ranks, parts, training) if ranks.rank == 0 else None
    try:
        figures = fit(training, config.train, ranks, watch)
    except NonFiniteLoss as error:
        if watch:
            watch.give_up()
        kept = (
            f"{folder.checkpoint} holds the state of the last evaluation"
            if folder.checkpoint.exists()
            else "nothing was saved yet"
        )
        raise UserError(
            f"{error}: every rank has stopped and {kept}; try a lower optim.lr, a longer schedule.warmup_epochs or "
            "train.clip_norm=1",
            on_every_rank=True,
        ) from error
    if watch:
        watch.finish(figures, time.monotonic() - began)


@dataclass
class Parts:
    """What each rank builds alone."""

    data: data.Data
    model: nn.Module
    converted: int
    task: tasks.Task


def build(config: Config, ranks: World) -> Parts:
    """Data, model and task. No rank speaks to another here."""
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
    average = None
    if config.train.ema:
        average = AveragedModel(parts.model, multi_avg_fn=get_ema_multi_avg_fn(config.train.ema), use_buffers=True)
    if config.train.compile:
        parts.model.compile()
    model = DistributedDataParallel(
        parts.model,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Synchronised statistics are the same everywhere; those of other norms follow rank 0, as DDP's default has it
        **{BROADCAST_BUFFERS: not norms.synchronised(parts.model)},  # pyright: ignore[reportArgumentType]
    )
    torch.manual_seed(config.seed + ranks.rank)  # from here on only dropout and its like draw from it
    global_batch = config.data.batch_per_rank * ranks.size * config.train.accumulate
    optimizer = optim.build(config.optim, parts.model, global_batch)
    steps_per_epoch = parts.data.steps_per_epoch
    steps = config.train.total_steps(steps_per_epoch)
    schedule = optim.build_schedule(config.schedule, optimizer, steps=steps, steps_per_epoch=steps_per_epoch)
    return Training(model, parts.task, parts.data, optimizer, schedule, average)


class Watch:
    """Rank 0's eyes on a training: screen, record, W&B and checkpoints."""

    def __init__(self, folder: RunFolder, config: Config, ranks: World, parts: Parts, training: Training):
        self.folder, self.config, self.ranks = folder, config, ranks
        self.objective = f"eval/{parts.task.objective}"
        self.converted = converted(parts, config)
        steps = config.train.total_steps(parts.data.steps_per_epoch)
        self.screen = Screen(steps)
        self.screen.say(
            f"{config.data.name}, {len(parts.data.classes)} classes | {config.model.name}, {self.converted} | "
            f"{ranks.size} × {config.data.batch_per_rank} images on {ranks.device.type} | {steps} steps"
        )
        if config.norm.name != "local" and not parts.converted:
            log.warning("norm=%s converted nothing: %s", config.norm.name, norms.nothing_converted(parts.model))
        self.record = Record(folder.metrics)
        name = config.run.name or ""
        group = name.removesuffix(f"-seed{config.seed}")
        self.tracker = Tracker(config.wandb, folder.path.absolute(), name=name, group=group, settings=as_dict(config))
        self.screen.start()

    def stepped(self, step: int) -> None:
        self.screen.stepped(step)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.record.log(step, figures)
        self.tracker.log(step, figures)
        self.screen.log(step, figures)

    def save(self, training: Training) -> None:
        state = {
            "step": training.step,
            "model": training.model.module.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "schedule": training.schedule.state_dict(),
        }
        if training.average:
            state["average"] = training.average.state_dict()
        checkpoint.save(self.folder.checkpoint, state)

    def give_up(self) -> None:
        self.screen.stop()
        self.record.close()
        self.tracker.finish(exit_code=1)

    def finish(self, figures: dict[str, float], duration_s: float) -> None:
        self.record.close()
        result = {
            "objective": figures[self.objective],
            "metrics": figures,
            "ranks": self.ranks.size,
            "duration_s": round(duration_s, 1),
        }
        self.folder.result.write_text(json.dumps(result, indent=1) + "\n")
        self.tracker.finish()
        self.screen.close(
            {**shown(figures), "norm": self.converted, "time": f"{duration_s:.0f} s", **self.where_to_look()}
        )

    def where_to_look(self) -> dict[str, Any]:
        rows = {"run": f"{self.folder.path}/", "figures": self.folder.metrics, "weights": self.folder.checkpoint}
        if self.tracker.failure:
            return {**rows, "W&B": f"failed: {self.tracker.failure}"}
        if files := self.tracker.files:
            files = files.relative_to(Path.cwd()) if files.is_relative_to(Path.cwd()) else files
            return {**rows, "look": f"wandb leet {files}", "upload": f"wandb sync {files}"}
        return rows


def converted(parts: Parts, config: Config) -> str:
    total = sum(isinstance(m, norms._BatchNorm) for m in parts.model.modules())
    return f"norm={config.norm.name}: {parts.converted} of {total} batch norm layers converted"


def shown(figures: dict[str, float]) -> dict[str, str]:
    """Metrics as a person reads them."""
    shares = ("accuracy",)
    return {k: f"{v:.2%}" if k.endswith(shares) else f"{v:.4f}" if v % 1 else f"{v:.0f}" for k, v in figures.items()}


def log_to(path: Path, *, warn: bool) -> None:
    """Send this rank's log and warnings to a file, and rank 0's warnings to stderr as well."""
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [file]
    if warn:
        screen = logging.StreamHandler()
        screen.setLevel(logging.WARNING)
        screen.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
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
        return USER_ERROR
    except Exception:
        log.exception("rank %d failed", world.rank())
        raise
    world.leave()
    return 0


if __name__ == "__main__":
    sys.exit(as_rank(lambda: from_yaml(Path(sys.argv[1]).read_text())))
