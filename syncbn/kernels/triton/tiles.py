"""How a pass over a tensor sees it: in tiles, by programs, with an affine map for each channel.

A tensor lies in memory as [N, C, S], and a tile of it is [BN, BC, BS]; t counts tiles along N and S, and each program
has one block of BC channels. V is the dtype that values are computed in, INT that of offsets. What is None is left out.
Divisions in float64 take some 40 instructions, so each program makes one and multiplies by it.
"""

import triton
import triton.language as tl

# Ints that change from batch to batch: without this Triton would compile anew where one is 1 or divisible by 16. And
# pointers that need not be aligned to 16 bytes: of vectors, where wide loads bring nothing
COUNTS = ["N", "parts", "size", "programs"]
VECTORS = ["shared", "sums", "weight", "bias", "running_mean", "running_var", "batches"]


@triton.jit
def locate(programs, C, BC: tl.constexpr):
    """Of so many programs, this one's number among those of its block of channels; the block; its channels."""
    blocks = tl.cdiv(C, BC)
    program = tl.program_id(0) - (tl.num_programs(0) - programs)
    return program // blocks, program % blocks, (program % blocks) * BC + tl.arange(0, BC)


@triton.jit
def tile(t, c, N, C, S, BN: tl.constexpr, BS: tl.constexpr, INT: tl.constexpr):
    """Of tile t: offsets and whether they are inside, [BN, BC, BS]; the same for a mask, which has one channel."""
    columns = tl.cdiv(S, BS)
    n = (t // columns).to(INT) * BN + tl.arange(0, BN)
    s = (t % columns).to(INT) * BS + tl.arange(0, BS)
    place, place_inside = n[:, None, None] * S + s[None, None, :], (n < N)[:, None, None] & (s < S)[None, None, :]
    offsets = (n[:, None, None] * C + c[None, :, None]) * S + s[None, None, :]
    return offsets, place_inside & (c < C)[None, :, None], place, place_inside


@triton.jit
def total_of(tile):
    """[BC] float64 of [BN, BC, BS]."""
    return tl.sum(tl.sum(tile, 2), 0).to(tl.float64)


@triton.jit
def affine(mean, invstd, weight, bias, c, C, V: tl.constexpr):
    """pivot, scale, shift and rest [1, BC, 1] such that y = (x - pivot) * scale + shift, and pivot - mean = rest."""
    pivot, scale = mean.to(V), invstd.to(V)
    rest = (pivot.to(tl.float64) - mean).to(V)
    if weight is not None:
        scale *= tl.load(weight + c, c < C, 0.0).to(V)
    shift = rest * scale
    if bias is not None:
        shift += tl.load(bias + c, c < C, 0.0).to(V)
    return pivot[None, :, None], scale[None, :, None], shift[None, :, None], rest[None, :, None]


@triton.jit
def affine_of(stats, weight, bias, c, C, V: tl.constexpr):
    """_affine with the mean and invstd that `normalize` left behind."""
    mean, invstd = tl.load(stats + c, c < C, 0.0), tl.load(stats + 2 * C + 1 + c, c < C, 0.0)
    return affine(mean, invstd, weight, bias, c, C, V)
