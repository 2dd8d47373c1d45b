"""Exact statistics of a whole data stream in the running buffers."""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import collectives, kernels
from syncbn.collectives import ProcessGroup
from syncbn.module import SyncBatchNorm
from syncbn.moments import Moments, merge, to_row


def recalibrate(
    model: nn.Module, batches: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> dict[str, Moments]:
    """Set the running statistics of a model to those of a whole data stream, instead of a trailing average.

    For each batch norm layer and channel, over every value that entered the layer in all batches of all ranks:
    running_mean = sum x / n, running_var = sum (x - mean)² / (n - 1), summed in float64. Layers normalise by their
    batch as in training, together with the peers that they have in training; all other modules run as in eval.

    It works on SyncBatchNorm and torch's own batch norms. Layers that are in eval mode while model is in training
    mode are frozen: they stay as they are. Nothing else of the model changes: not parameters, gradients, modes or
    num_batches_tracked, nor torch's random state; if an error is raised, not the statistics either.

    Args:
        model: any module, wrapped or not. A compiled one runs uncompiled here.
        batches: this rank's part of the stream, on the model's device. Batches may differ in size, and be empty.
        forward: runs model on a batch; None is model(batch), or model(batch[0]) of a tuple or list.

    Returns:
        The population's Moments by layer name, the same bits on every rank. Of a layer that no value reached the
        count is 0, and its running statistics stay.

    Raises:
        ValueError: model has no layer to recalibrate, or not the same ones on all ranks; there are no batches, or not
            equally many on all ranks; a layer's moments are not finite. The same on every rank.
        RuntimeError: another rank's batches raised an error, and this rank's did not.

    Collective: every rank of the default process group must call it, whatever the layers' own groups. Beside the
    layers' own: a small message at the start, 8 bytes before each batch, and at the end one of 2C + 1 float64 for
    each layer. As in training, a forward that fails on one rank alone leaves its peers waiting.

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3 (PreciseBN).
    """
    world = collectives.everyone()
    layers = _layers(model, world)
    with _measured(model, layers) as rows:
        for batch in _in_step(batches, world):
            (forward or _forward)(model, batch)
    population = _population(rows, world)
    for name, layer in layers.items():
        if population[name].count > 0:
            layer.running_mean.copy_(population[name].mean)
            layer.running_var.copy_(population[name].unbiased_var)
    return {name: Moments(*(t.to(rows[name].device) for t in moments)) for name, moments in population.items()}


def _layers(model: nn.Module, world: ProcessGroup | None) -> dict[str, Any]:
    """The layers to recalibrate, by name; ValueError if there are none or ranks differ."""
    tracking: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }
    layers = {name: layer for name, layer in tracking.items() if layer.training or not model.training}
    channels = {name: layer.running_mean.numel() for name, layer in layers.items()}
    by_rank = collectives.gather_objects(channels, world)
    for rank, theirs in enumerate(by_rank):
        if theirs != by_rank[0]:
            name = min(theirs.items() ^ by_rank[0].items())[0]
            raise ValueError(
                f"rank {rank} recalibrates {len(theirs)} layers and rank 0 {len(by_rank[0])}, and {name!r} differs: "
                "the model, and which of its layers are in eval mode, must be the same on every rank"
            )
    if not tracking:
        raise ValueError(f"{type(model).__name__} has no batch norm layer with running statistics to recalibrate")
    if not layers:
        raise ValueError(
            f"all {len(tracking)} batch norm layers are in eval mode, so frozen, in a model in training mode: "
            "call model.eval() first to recalibrate them all"
        )
    return layers


@contextmanager
def _measured(model: nn.Module, layers: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Moments of what enters each layer, as rows by name; on leaving, model is as it was before."""
    means = {name: layer.running_mean for name, layer in layers.items()}
    rows = {name: mean.new_zeros(2 * mean.numel() + 1, dtype=torch.float64) for name, mean in means.items()}
    modes = [(module, module.training) for module in model.modules()]
    # Those of frozen layers too, as DDP broadcasts them
    buffers = [b for module in model.modules() if isinstance(module, _BatchNorm) for b in module.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    devices = {row.get_device() for row in rows.values() if row.is_cuda}
    hooks = []
    try:
        for module, _ in modes:
            # Not .train() and .eval(), which some modules override to do more
            module.training = module in layers.values()
        for name, layer in layers.items():
            hooks.append(layer.register_forward_hook(partial(_measure, rows, name), with_kwargs=True))
        with torch.no_grad(), torch.random.fork_rng(devices), _uncompiled():
            yield rows
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _measure(rows: dict[str, Tensor], name: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
    """Add what entered the layer to its row. A hook after forward, which has checked x and mask, on all ranks alike."""
    x = args[0] if args else kwargs["x" if "x" in kwargs else "input"]
    mask = None
    if isinstance(layer, SyncBatchNorm):
        mask = args[2] if len(args) > 2 else kwargs.get("mask")
    if mask is not None and mask.dim() == 1:
        mask = mask.view(-1, *[1] * (x.dim() - 1))
    local = kernels.choose(x).moments(x.detach().double(), mask, "row")
    rows[name] = to_row(merge(torch.stack([rows[name], local.packed])))


def _in_step(batches: Iterable[Any], world: ProcessGroup | None) -> Iterator[Any]:
    """This rank's batches, each only once all ranks have one, as layers wait for each other."""
    # Makes the iterator at the first next, where its errors are caught
    mine = itertools.chain.from_iterable([batches])
    for done in itertools.count():
        batch = error = None
        try:
            batch, state = next(mine), 0
        except StopIteration:
            state = 1
        except Exception as raised:
            error, state = raised, 2
        states = collectives.gather_rows(torch.tensor([state]), world).flatten().tolist()
        ready, ended, failed = ([rank for rank, one in enumerate(states) if one == state] for state in range(3))
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(f"the batches of ranks {failed} raised an error after {done}: see what they report")
        if not ready:
            break
        if ended:
            raise ValueError(
                f"ranks {ended} of {len(states)} ran out of batches after {done}, the others did not: every rank must "
                "give as many; an empty one, x[:0], counts"
            )
        yield batch
    if done == 0:
        raise ValueError("there are no batches: recalibrate needs at least one (is the iterator used up?)")


def _forward(model: nn.Module, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _population(rows: dict[str, Tensor], world: ProcessGroup | None) -> dict[str, Moments]:
    """The moments of all ranks together, on the CPU; the same bits on every rank."""
    mine = torch.cat([row.cpu() for row in rows.values()])
    theirs = collectives.gather_rows(mine, world).split([row.numel() for row in rows.values()], dim=1)
    population = {name: merge(one) for name, one in zip(rows, theirs, strict=True)}
    for name, moments in population.items():
        if not to_row(moments).isfinite().all():
            raise ValueError(f"what enters {name!r} is not finite in some batch: running statistics stay as they were")
    return population


def _uncompiled() -> Any:
    # Compiled code passes by hooks that are younger than it; where none is, importing the compiler would take seconds
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
