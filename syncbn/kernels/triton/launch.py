"""How a compiled kernel is launched, and what it is lent: past Triton's look at each argument, 15 us a launch."""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from syncbn.kernels.triton.plan import RESIDENT, WARPS, Cut, Plan

# Of a multiprocessor
REGISTERS = 2**16

# Of the kernels that have no plan
runners_of_statistics: dict[Any, Any] = {}


def start(runners: dict[Any, Any], device: torch.device, kernel: Any, programs: int, key: Any, *inputs: Any) -> None:
    """Launch so many programs; key tells apart all that Triton compiles, and starts, in another way."""
    index = device.index
    if index is not None and index != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(runners, device, kernel, programs, key, *inputs)
    elif key in runners:
        # What compiled[(programs, 1, 1)](*inputs) comes to where no profiler has put hooks into Triton
        run, function, metadata = runners[key]
        run(programs, 1, 1, _stream(index), function, metadata, None, None, None, *inputs)
    else:
        compiled = kernel[(programs,)](*inputs, **options(kernel))
        # Triton's interpreter, of the tests, compiles nothing
        if compiled is not None:
            runners[key] = compiled.run, compiled.function, compiled.packed_metadata


def options(kernel: Any) -> dict[str, Any]:
    """What a kernel is compiled with."""
    resident = RESIDENT.get(kernel.__name__, 1)
    # Registers are given out by eights
    return {
        "num_warps": WARPS,
        "enable_fp_fusion": True,
        "maxnreg": min(255, REGISTERS // (32 * WARPS * resident) // 8 * 8),
    }


def _stream(index: int | None) -> int:
    """The current stream of a GPU, as the driver knows it."""
    return driver.active.get_current_stream(index or 0)  # pyright: ignore[reportAttributeAccessIssue]


kept_scratch: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def scratch(plan: Plan, cut: Cut, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Room for the rows that are merged, and counters, which are 0 between launches; none where there is one part.

    A stream's launches, which follow one another, share theirs. A CUDA graph, which may be replayed on any stream, has
    its own.
    """
    if cut.programs == plan.blocks:
        return None, None
    size = (cut.programs // plan.blocks + cut.groups) * length, (cut.groups + 1) * plan.blocks
    index = plan.device.index
    if index is None:
        # In Triton's interpreter, of the tests, there are no streams
        place = (-1, 0)
    elif torch.cuda.is_current_stream_capturing():
        return _new_scratch(plan.device, *size)
    else:
        place = index, _stream(index)
    kept = kept_scratch.get(place)
    if kept is None or kept[0].numel() < size[0] or kept[1].numel() < size[1]:
        # Grown in large steps, so that shapes that change allocate seldom
        kept = kept_scratch[place] = _new_scratch(plan.device, *(triton.next_power_of_2(max(n, 2**14)) for n in size))
    return kept


def _new_scratch(device: torch.device, rows: int, counters: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(rows, dtype=torch.float64, device=device),
        torch.zeros(counters, dtype=torch.int32, device=device),
    )
