"""How a tensor is cut up into tiles, parts and programs: once for each shape."""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile: 16 for each thread of 8 warps
TILE, WARPS = 4096, 8
# Programs that a multiprocessor holds at once, and has the registers for: as many as take no more than they need
RESIDENT = {"moments": 3, "normalize": 3, "grad_sums": 2, "grad_input": 2}
# Tiles of a tensor that is one part: there merging takes longer than the second tile
SMALL = 2
# Rows that are merged at a time
ROWS = 32
# Elements up to which offsets are int32
INT32 = 2**30
# Shapes whose plans are kept
SHAPES = 2**12


class Cut(NamedTuple):
    """How a pass that adds up is cut.

    parts: of a tensor. size: of a group of parts whose rows are merged together. groups: of all tensors.
    programs: of all parts and blocks of channels.
    """

    parts: int
    size: int
    groups: int
    programs: int


class Plan(NamedTuple):
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
    moments: Cut
    sums: Cut
    normalize: int
    grad_input: int
    runners: dict[Any, Any]


def planned(x: Tensor, images: int = 0) -> tuple[Tensor, Plan]:
    """x, copied if it lies in memory with gaps, and the plan for it as a whole, or for its images if given how many."""
    plan = plan_of(x.shape, x.stride(), x.dtype, x.device, images)
    if plan is None:
        x = x.contiguous()
        plan = plan_of(x.shape, x.stride(), x.dtype, x.device, images)
        assert plan is not None
    return x, plan


@lru_cache(SHAPES)
def plan_of(shape: torch.Size, stride: Any, dtype: torch.dtype, device: torch.device, images: int) -> Plan | None:
    """None for a tensor with gaps."""
    like = torch.empty(0, device="meta").as_strided(shape, stride)
    last = not like.is_contiguous()
    if last and not like.movedim(1, -1).is_contiguous():
        return None
    tensors = max(images, 1)
    channels, places = shape[1], shape.numel() // shape[1] // tensors
    inner = 1 if last or not places else places * tensors // shape[0]
    outer = places // inner
    columns = min(triton.next_power_of_2(inner), TILE)
    # Channels side by side fill a tile's row; planes, only as far as they are small
    wide = min(triton.next_power_of_2(channels), max(1, (64 if inner == 1 else 256) // columns))
    height = min(triton.next_power_of_2(max(outer, 1)), TILE // (columns * wide))
    blocks = triton.cdiv(channels, wide)
    tiles = triton.cdiv(outer, height) * triton.cdiv(inner, columns)

    def programs(kernel: str, tensors: int = 1, besides: int = 0) -> int:
        """Of a block and a tensor: as many as run at once, with as many tiles each as the one that has most."""
        room = max(1, (RESIDENT[kernel] * multiprocessors(device) - besides) // (blocks * tensors))
        return triton.cdiv(tiles, triton.cdiv(tiles, min(tiles, room))) if tiles else 0

    def cut(kernel: str, tensors: int) -> Cut:
        parts = 1 if tiles <= SMALL else programs(kernel, tensors)
        total = parts * tensors
        # Two levels of about the same height; but an image is a group
        size = parts if tensors == images else total if total <= ROWS else triton.cdiv(total, int(total**0.5))
        return Cut(parts, size, triton.cdiv(total, size), total * blocks)

    values = tl.float64 if dtype == torch.float64 else tl.float32
    offsets = tl.int32 if places * channels <= INT32 else tl.int64
    tile = (values, height, wide, columns, offsets)
    of_normalize, of_input = programs("normalize", besides=1) * blocks, programs("grad_input") * blocks
    cuts = cut("moments", tensors), cut("grad_sums", 1)
    merged = min(ROWS, 512 // wide)
    return Plan(device, (outer, channels, inner), tile, merged, blocks, *cuts, of_normalize, of_input, {})


@cache
def multiprocessors(device: torch.device) -> int:
    # Triton's interpreter, of the tests, has none
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
