"""A forward and a backward in one call each, the message between their passes too.

On small maps it is not the passes that take time but what Python does around them, so here every line counts.
"""

import torch
from torch import Tensor

from syncbn.kernels import eager
from syncbn.kernels.contract import Affine, Backward, Form, Local, Running, Slot, Stopped, Wire
from syncbn.kernels.cpu.library import UNFINISHED, calls
from syncbn.kernels.cpu.records import (
    address,
    laid_out,
    like,
    movable,
    of_affine,
    of_places,
    of_running,
    threads,
    without_gaps,
)

_NO_SLOT = 0, 0, 0, 0


def forward(
    x: Tensor,
    mask: Tensor | None,
    form: Form,
    affine: Affine,
    residual: Tensor | None,
    running: Running | None,
    wire: Wire,
    slot: Slot | None,
) -> tuple[Tensor, Tensor] | Stopped:
    x, layout = laid_out(x)
    affine = without_gaps(affine)
    mask = None if mask is None else of_places(mask, x)
    residual = None if residual is None else like(x, residual)
    here = None if running is None or not movable(running) else running
    y, stats = torch.empty_like(x), torch.empty(3 * layout.channels + 1, dtype=torch.float64)
    answer = calls.forward(
        *layout.record, threads(layout), x.data_ptr(), address(mask), address(residual), y.data_ptr(),
        stats.data_ptr(), form == "message", *of_affine(affine), *of_running(here), *wire,
        *(_NO_SLOT if slot is None else slot.addresses),
    )  # fmt: skip
    if answer:
        return _stopped(stats, form, slot, answer)
    if here is not None:
        torch.autograd.graph.increment_version(here[:3])
    elif running is not None:
        eager.update_running(running, stats)
    return y, stats


def _stopped(stats: Tensor, form: Form, slot: Slot | None, answer: int) -> Stopped:
    shared = stats.narrow(0, 0, 2 * stats.size(0) // 3 + 1)
    local = Local(shared)
    if slot is not None:
        # It will not be filled
        packed, between, _ = slot
        local = Local(packed.clone(), None, None if between is None else between.clone())
        for part in packed, between:
            if part is not None:
                part.zero_()
    return Stopped(local, shared.unsqueeze(0) if form == "row" else shared, max(0, answer - UNFINISHED))


def backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    affine: Affine,
    y: Tensor | None,
    mask: Tensor | None,
    wire: Wire,
    wants_dx: bool,
) -> Backward:
    x, layout = laid_out(x)
    dy, affine = like(x, dy), without_gaps(affine)
    weight, bias, *_ = affine
    y, g = (None, dy) if y is None else (like(x, y), torch.empty_like(x))
    mask = None if mask is None else of_places(mask, x)
    dx = torch.empty_like(x) if wants_dx else None
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    answer = calls.backward(
        *layout.record, threads(layout), dy.data_ptr(), x.data_ptr(), address(y), g.data_ptr(), address(mask),
        address(dx), stats.data_ptr(), address(dweight), address(dbias), *of_affine(affine), *wire,
    )  # fmt: skip
    return Backward(dx, dweight, dbias, g, max(0, answer - UNFINISHED))
