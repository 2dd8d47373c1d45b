"""The kernels in Triton, for CUDA devices: a step is four launches, each of which reads and writes its tensors once.

A tensor lies in memory as [N, C, S], or, where channels are last, as [N * S, C, 1]. Where the relu let a value through
is computed from x again, unless a residual was added.

What the host does in a step is kept small, as a step of a few images is bound by it: how a tensor is cut up is planned
once for each shape, and a compiled kernel is launched as it is, past Triton's look at each argument (15 us a launch).
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from syncbn.kernels import passes, steps
from syncbn.kernels.contract import Affine, Form, Local, Running, Sums

NEEDS_Y = False

# Elements of a tile: 16 for each thread of 8 warps
_TILE, _WARPS = 4096, 8
# Programs that a multiprocessor holds at once, and has the registers for: as many as take no more than they need
_RESIDENT = {"moments": 3, "normalize": 3, "grad_sums": 2, "grad_input": 2}
_REGISTERS = 2**16
# Tiles of a tensor that is one part: there merging takes longer than the second tile
_SMALL = 2
# Rows that are merged at a time
_ROWS = 32
# Columns that a program takes of the rows that ranks gathered
_COLUMNS = 8
# Elements up to which offsets are int32
_INT32 = 2**30
# Shapes whose plans are kept
_SHAPES = 2**12


def moments(x: Tensor, mask: Tensor | None, form: Form, per_image: bool = False) -> Local:
    channels = x.size(1)
    if x.numel() == 0:
        nothing = x.new_zeros(2 * channels + 1, dtype=torch.float64)
        return Local(nothing, None, nothing[: channels + 1] if per_image else None)
    x, plan = _planned(x, x.size(0) if per_image else 0)
    cut, places = plan.moments, None if mask is None else _of_places(mask, x)
    packed = torch.empty(2 * channels + 1, dtype=torch.float64, device=plan.device)
    apart = torch.empty(channels + 1, dtype=torch.float64, device=plan.device) if per_image else None
    rows, counters = _scratch(plan, cut, 2 * channels + 1)
    key = ("moments", form, mask is None, per_image, x.data_ptr() % 16)
    inputs = (x, places, rows, counters, packed, apart, *plan.layout, cut.parts, cut.size, form == "message")
    _launch(plan.runners, plan.device, passes.moments, cut.programs, key, *inputs, *plan.tile, plan.rows)
    return Local(packed, plan, apart)


def normalize(
    x: Tensor,
    shared: Tensor,
    affine: Affine,
    residual: Tensor | None = None,
    running: Running | None = None,
    work: Any = None,
) -> tuple[Tensor, Tensor]:
    x, plan = _planned(x)
    y = torch.empty_like(x)
    stats = torch.empty(3 * x.size(1) + 1, dtype=torch.float64, device=plan.device)
    if residual is not None:
        residual = _laid_out_as(x, residual)
    weight, bias, relu, eps = affine
    mean, var, batches, momentum = running or (None, None, None, 0.0)
    summed = shared.dim() == 1
    if not summed and shared.size(0) > 1:
        shared = _merged(shared)
    key = (
        "normalize",
        x.data_ptr() % 16,
        residual is None or residual.data_ptr() % 16,
        _dtype(weight),
        _dtype(bias),
        _dtype(mean),
        momentum is None,
        relu,
        summed,
    )
    vectors = (shared, stats, _without_gaps(weight), _without_gaps(bias), mean, var, batches)
    options = (eps, momentum or 0.0, summed, momentum is None, relu)
    inputs = (x, residual, y, *vectors, plan.normalize, *plan.layout, *options)
    _launch(plan.runners, plan.device, passes.normalize, plan.normalize + 1, key, *inputs, *plan.tile)
    if running is not None:
        torch.autograd.graph.increment_version(running[:3])
    return y, stats


def update_running(running: Running, stats: Tensor) -> None:
    mean, var, batches, momentum = running
    key = ("update_running", stats.size(0), stats.device, mean.dtype, momentum is None)
    inputs = (mean, var, batches, stats, mean.size(0), momentum or 0.0, momentum is None)
    _launch(_runners, stats.device, steps.update_running, 1, key, *inputs)
    torch.autograd.graph.increment_version(running[:3])


def grad_sums(dy: Tensor, x: Tensor, stats: Tensor, affine: Affine, y: Tensor | None) -> Sums:
    channels, (weight, bias, relu, _) = x.size(1), affine
    if x.numel() == 0:
        dweight, dbias = (None if t is None else torch.zeros_like(t) for t in (weight, bias))
        return Sums(x.new_zeros(2 * channels, dtype=torch.float64), dweight, dbias, dy)
    x, plan = _planned(x)
    cut, dy = plan.sums, _laid_out_as(x, dy)
    g = None if y is None else torch.empty_like(dy)
    packed = torch.empty(2 * channels, dtype=torch.float64, device=plan.device)
    dweight = None if weight is None else torch.empty(channels, dtype=weight.dtype, device=plan.device)
    dbias = None if bias is None else torch.empty(channels, dtype=bias.dtype, device=plan.device)
    rows, counters = _scratch(plan, cut, 2 * channels)
    key = (
        "grad_sums",
        x.data_ptr() % 16,
        dy.data_ptr() % 16,
        y is None or y.data_ptr() % 16,
        _dtype(weight),
        _dtype(bias),
        relu,
    )
    vectors = (rows, counters, packed, dweight, dbias, stats, _without_gaps(weight), _without_gaps(bias))
    inputs = (dy, x, y, g, *vectors, *plan.layout, cut.parts, cut.size, relu)
    _launch(plan.runners, plan.device, passes.grad_sums, cut.programs, key, *inputs, *plan.tile, plan.rows)
    return Sums(packed, dweight, dbias, dy if g is None else g)


def grad_input(g: Tensor, x: Tensor, stats: Tensor, affine: Affine, sums: Tensor, mask: Tensor | None) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    x, plan = _planned(x)
    g, dx, places = _laid_out_as(x, g), torch.empty_like(x), None if mask is None else _of_places(mask, x)
    weight, bias, relu, _ = affine
    key = ("grad_input", x.data_ptr() % 16, g.data_ptr() % 16, mask is None, _dtype(weight), _dtype(bias), relu)
    vectors = (stats, _without_gaps(weight), _without_gaps(bias), sums)
    inputs = (g, x, places, dx, *vectors, *plan.layout, relu)
    _launch(plan.runners, plan.device, passes.grad_input, plan.grad_input, key, *inputs, *plan.tile)
    return dx


def probe(device: torch.device) -> None:
    """Compile and run every kernel, and again as compiled: for one element, and for parts that are merged.

    Raises what fails.
    """
    for shape in [(1, 3), (1, 1, 4 * _TILE)] * 2:
        x = torch.zeros(shape, device=device)
        mask = torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool, device=device)
        batches = torch.zeros((), dtype=torch.int64, device=device)
        running = Running(x.new_zeros(shape[1]), x.new_zeros(shape[1]), batches, 0.1)
        local = moments(x, mask, "message", per_image=True)
        y, stats = normalize(x, local.packed.expand(2, -1).contiguous(), Affine(relu=True), x, running)
        update_running(running, stats)
        sums = grad_sums(y, x, stats, Affine(relu=True), y)
        grad_input(sums.g, x, stats, Affine(), sums.packed, mask)


def _merged(rows: Tensor) -> Tensor:
    """The row [2C + 1] that gathered rows [W, 2C + 1] are together."""
    rows, channels = rows.contiguous(), rows.size(1) // 2
    merged = rows.new_empty(rows.size(1))
    key = ("merge", channels, rows.device)
    inputs = (rows, merged, channels, rows.size(0), _ROWS, _COLUMNS)
    _launch(_runners, rows.device, steps.merge, triton.cdiv(channels, _COLUMNS), key, *inputs)
    return merged


class _Cut(NamedTuple):
    """How a pass that adds up is cut.

    parts: of a tensor. size: of a group of parts whose rows are merged together. groups: of all tensors.
    programs: of all parts and blocks of channels.
    """

    parts: int
    size: int
    groups: int
    programs: int


class _Plan(NamedTuple):
    """How the passes over a tensor are cut up.

    layout: [N, C, S], as it lies in memory.
    tile: the constants of a pass: dtype of values, BN, BC, BS, dtype of offsets.
    rows: that are merged at a time. blocks: of channels. normalize, grad_input: programs.
    runners: what launches the compiled kernels, by what they were compiled for.
    """

    device: torch.device
    layout: tuple[int, int, int]
    tile: tuple[Any, int, int, int, Any]
    rows: int
    blocks: int
    moments: _Cut
    sums: _Cut
    normalize: int
    grad_input: int
    runners: dict[Any, Any]


def _planned(x: Tensor, images: int = 0) -> tuple[Tensor, _Plan]:
    """x, copied if it lies in memory with gaps, and the plan for it as a whole, or for its images if given how many."""
    plan = _plan(x.shape, x.stride(), x.dtype, x.device, images)
    if plan is None:
        x = x.contiguous()
        plan = _plan(x.shape, x.stride(), x.dtype, x.device, images)
        assert plan is not None
    return x, plan


@lru_cache(_SHAPES)
def _plan(shape: torch.Size, stride: Any, dtype: torch.dtype, device: torch.device, images: int) -> _Plan | None:
    """None for a tensor with gaps."""
    like = torch.empty(0, device="meta").as_strided(shape, stride)
    last = not like.is_contiguous()
    if last and not like.movedim(1, -1).is_contiguous():
        return None
    tensors = max(images, 1)
    channels, places = shape[1], shape.numel() // shape[1] // tensors
    inner = 1 if last or not places else places * tensors // shape[0]
    outer = places // inner
    columns = min(triton.next_power_of_2(inner), _TILE)
    # Channels side by side fill a tile's row; planes, only as far as they are small
    wide = min(triton.next_power_of_2(channels), max(1, (64 if inner == 1 else 256) // columns))
    height = min(triton.next_power_of_2(max(outer, 1)), _TILE // (columns * wide))
    blocks = triton.cdiv(channels, wide)
    tiles = triton.cdiv(outer, height) * triton.cdiv(inner, columns)

    def programs(kernel: str, tensors: int = 1, besides: int = 0) -> int:
        """Of a block and a tensor: as many as run at once, with as many tiles each as the one that has most."""
        room = max(1, (_RESIDENT[kernel] * _multiprocessors(device) - besides) // (blocks * tensors))
        return triton.cdiv(tiles, triton.cdiv(tiles, min(tiles, room))) if tiles else 0

    def cut(kernel: str, tensors: int) -> _Cut:
        parts = 1 if tiles <= _SMALL else programs(kernel, tensors)
        total = parts * tensors
        # Two levels of about the same height; but an image is a group
        size = parts if tensors == images else total if total <= _ROWS else triton.cdiv(total, int(total**0.5))
        return _Cut(parts, size, triton.cdiv(total, size), total * blocks)

    values = tl.float64 if dtype == torch.float64 else tl.float32
    offsets = tl.int32 if places * channels <= _INT32 else tl.int64
    tile = (values, height, wide, columns, offsets)
    of_normalize, of_input = programs("normalize", besides=1) * blocks, programs("grad_input") * blocks
    cuts = cut("moments", tensors), cut("grad_sums", 1)
    merged = min(_ROWS, 512 // wide)
    return _Plan(device, (outer, channels, inner), tile, merged, blocks, *cuts, of_normalize, of_input, {})


@cache
def _multiprocessors(device: torch.device) -> int:
    # Triton's interpreter, of the tests, has none
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


_runners: dict[Any, Any] = {}


def _launch(runners: dict[Any, Any], device: torch.device, kernel: Any, programs: int, key: Any, *inputs: Any) -> None:
    """Launch so many programs; key tells apart all that Triton compiles, and starts, in another way."""
    index = device.index
    if index is not None and index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(runners, device, kernel, programs, key, *inputs)
    elif key in runners:
        # What compiled[(programs, 1, 1)](*inputs) comes to where no profiler has put hooks into Triton
        run, function, metadata = runners[key]
        run(programs, 1, 1, _stream(index), function, metadata, None, None, None, *inputs)
    else:
        compiled = kernel[(programs,)](*inputs, **_options(kernel))
        # Triton's interpreter, of the tests, compiles nothing
        if compiled is not None:
            runners[key] = compiled.run, compiled.function, compiled.packed_metadata


def _options(kernel: Any) -> dict[str, Any]:
    """What a kernel is compiled with."""
    resident = _RESIDENT.get(kernel.__name__, 1)
    # Registers are given out by eights
    return {
        "num_warps": _WARPS,
        "enable_fp_fusion": True,
        "maxnreg": min(255, _REGISTERS // (32 * _WARPS * resident) // 8 * 8),
    }


def _stream(index: int | None) -> int:
    """The current stream of a GPU, as the driver knows it."""
    return driver.active.get_current_stream(index or 0)  # pyright: ignore[reportAttributeAccessIssue]


_kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def _scratch(plan: _Plan, cut: _Cut, length: int) -> tuple[Tensor | None, Tensor | None]:
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
    kept = _kept.get(place)
    if kept is None or kept[0].numel() < size[0] or kept[1].numel() < size[1]:
        # Grown in large steps, so that shapes that change allocate seldom
        kept = _kept[place] = _new_scratch(plan.device, *(triton.next_power_of_2(max(n, 2**14)) for n in size))
    return kept


def _new_scratch(device: torch.device, rows: int, counters: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(rows, dtype=torch.float64, device=device),
        torch.zeros(counters, dtype=torch.int32, device=device),
    )


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _without_gaps(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """other in x's memory format, of which x has no gaps."""
    if other.stride() == x.stride():
        return other
    strides = zip(x.shape, x.stride(), other.stride(), strict=True)
    if all(mine == theirs or size == 1 for size, mine, theirs in strides):
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


def _of_places(mask: Tensor, x: Tensor) -> Tensor:
    """One byte for each place of x, [N, 1, *S]."""
    return mask.expand(x.size(0), 1, *x.shape[2:]).contiguous().view(torch.uint8)
