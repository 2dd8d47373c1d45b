"""What each rank has built, joined over the ranks into what trains."""

from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.trainer import norms, world
from syncbn.trainer.config import Config
from syncbn.trainer.errors import UserError
from syncbn.trainer.rank.build import Parts
from syncbn.trainer.training import drift, optim
from syncbn.trainer.training.bad_steps import Guard
from syncbn.trainer.training.ema import Average
from syncbn.trainer.training.state import Training, seed_generators
from syncbn.trainer.training.totals import Totals
from syncbn.trainer.world import World


def assemble(parts: Parts, config: Config, ranks: World) -> Training:
    """The parts joined over the ranks. Collective."""
    with ranks.together():
        parts.task.prepare(parts.data)
    average = Average(parts.model, config.train.ema) if config.train.ema else None
    if config.train.compile:
        parts.model.compile(fullgraph=True)
    if not any(parameter.requires_grad for parameter in parts.model.parameters()):
        raise UserError(
            f"model.name={config.model.name} has no parameter to train (requires_grad is False for all, if there are "
            "any): leave some to train, or take task=evaluate",
            on_every_rank=True,
        )
    refuse_unfit_parts(parts, config)
    model = DistributedDataParallel(
        parts.model,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=config.train.find_unused_parameters or len(parts.task.parts) > 1,
        # Synchronised statistics are the same everywhere; those of other norms follow rank 0, as DDP's default has it
        **{world.BROADCAST_BUFFERS: not norms.synchronised(parts.model)},  # pyright: ignore[reportArgumentType]
    )
    seed_generators(config.seed + ranks.rank)  # from here on only dropout and its like draw from it
    optimizer = optim.build(config.optim, parts.model, parts.data.global_batch * config.train.accumulate)
    steps_per_epoch = parts.data.steps_per_epoch
    steps = config.train.total_steps(steps_per_epoch)
    schedule = optim.build_schedule(config.schedule, optimizer, steps=steps, steps_per_epoch=steps_per_epoch)
    guard = Guard(parts.model, optimizer, scaled=config.train.precision == "fp16")
    totals = Totals(parts.task.shapes, ranks)
    return Training(model, parts.task, parts.data, optimizer, schedule, guard, totals, average)


def refuse_unfit_parts(parts: Parts, config: Config) -> None:
    """Raise UserError, on every rank, if the model lacks a part of the task's, or a graph cannot hold several."""
    names = [name for name in parts.task.parts if name]
    modules = dict(parts.model.named_modules())
    if lacking := [name for name in names if name not in modules]:
        raise UserError(
            f"task={config.task.name} optimises {', '.join(names)}, and model.name={config.model.name} has no "
            f"{', '.join(lacking)}: give a model whose parts have these names",
            on_every_rank=True,
        )
    if config.train.cuda_graph and len(parts.task.parts) > 1:
        raise UserError(
            f"train.cuda_graph=true with task={config.task.name}, which optimises {', '.join(names)} in turn: DDP then "
            "has to find out what takes part in each loss, which no graph can hold; train.cuda_graph=false",
            on_every_rank=True,
        )


def watch_statistics(training: Training, parts: Parts, config: Config) -> None:
    """Have drift and a rank that does not come be noticed, as the config says. Collective."""
    training.drift = drift.monitor(parts.model, config.drift, expected=norms.NORMS[config.norm.name].running)
    training.recalibrate = config.eval.recalibrate
    training.desync = syncbn.DesyncMonitor(parts.model, patience_s=config.launch.timeout_s / 2, fingerprints=False)
