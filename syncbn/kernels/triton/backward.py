"""The two passes over x and the gradient of backward."""

import triton
import triton.language as tl

from syncbn.kernels.triton.statistics import add_rows, is_last
from syncbn.kernels.triton.tiles import COUNTS, VECTORS, affine_of, locate, tile, total_of


@triton.jit
def _store_sums(sums, c, C, total, dot):
    tl.store(sums + c, total, c < C)
    tl.store(sums + C + c, dot, c < C)


@triton.jit
def _store_gradients(packed, dweight, dbias, c, C, total, dot, V: tl.constexpr):
    _store_sums(packed, c, C, total, dot)
    if dweight is not None:
        tl.store(dweight + c, dot.to(V), c < C)
    if dbias is not None:
        tl.store(dbias + c, total.to(V), c < C)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def grad_sums(
    dy,
    x,
    y,
    g,
    rows,
    counters,
    packed,
    dweight,
    dbias,
    stats,
    weight,
    bias,
    N,
    C,
    S,
    parts,
    size,
    RELU: tl.constexpr,
    V: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    INT: tl.constexpr,
    BR: tl.constexpr,
):
    """packed [2C]: [sum g | sum g * xhat]; g = dy where relu let x through, stored if y. Parts as in `moments`."""
    row, block, c = locate(tl.num_programs(0), C, BC)
    pivot, scale, shift, rest = affine_of(stats, weight, bias, c, C, V)
    total, dot = tl.zeros([BN, BC, BS], V), tl.zeros([BN, BC, BS], V)
    for t in range(row, tl.cdiv(N, BN) * tl.cdiv(S, BS), parts):
        offsets, inside, _place, _here = tile(t, c, N, C, S, BN, BS, INT)
        centred = tl.load(x + offsets, inside, 0.0).to(V) - pivot
        past = tl.load(dy + offsets, inside, 0.0).to(V)
        if y is not None:
            past = tl.where(tl.load(y + offsets, inside, 0.0) <= 0, 0.0, past)
            tl.store(g + offsets, past, inside)
        elif RELU:
            past = tl.where(centred * scale + shift <= 0, 0.0, past)
        total += past
        dot += past * centred
    sum_g, sum_dot = total_of(total), total_of(dot) + tl.sum(tl.sum(rest, 2), 0).to(tl.float64) * total_of(total)
    sum_dot *= tl.load(stats + 2 * C + 1 + c, c < C, 0.0)
    if rows is None:
        _store_gradients(packed, dweight, dbias, c, C, sum_g, sum_dot, V)
    else:
        length = 2 * C
        _store_sums(rows + row * length, c, C, sum_g, sum_dot)
        group, groups = row // size, tl.cdiv(parts, size)
        members = tl.minimum(size, parts - group * size)
        if is_last(counters + group * tl.cdiv(C, BC) + block, members):
            sum_g, sum_dot = add_rows(rows + group * size * length, members, c, C, BR, BC)
            if groups == 1:
                _store_gradients(packed, dweight, dbias, c, C, sum_g, sum_dot, V)
            else:
                _store_sums(rows + (parts + group) * length, c, C, sum_g, sum_dot)
                if is_last(counters + groups * tl.cdiv(C, BC) + block, groups):
                    sum_g, sum_dot = add_rows(rows + parts * length, groups, c, C, BR, BC)
                    _store_gradients(packed, dweight, dbias, c, C, sum_g, sum_dot, V)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def grad_input(
    g,
    x,
    mask,
    dx,
    stats,
    weight,
    bias,
    sums,
    N,
    C,
    S,
    RELU: tl.constexpr,
    V: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    INT: tl.constexpr,
):
    """dx = (g - mean g - xhat * mean(g * xhat)) * invstd * weight, as an affine map of x plus one of g."""
    mine, _block, c = locate(tl.num_programs(0), C, BC)
    pivot, scale, shift, rest = affine_of(stats, weight, bias, c, C, V)
    share = 1 / tl.maximum(tl.load(stats + 2 * C), 1.0)
    mean_g = (tl.load(sums + c, c < C, 0.0) * share).to(V)[None, :, None]
    mean_g_xhat = tl.load(sums + C + c, c < C, 0.0) * share
    slope = -(tl.load(stats + 2 * C + 1 + c, c < C, 0.0) * mean_g_xhat).to(V)[None, :, None] * scale
    level = rest * slope
    tiles, step = tl.cdiv(N, BN) * tl.cdiv(S, BS), tl.num_programs(0) // tl.cdiv(C, BC)
    for i in range(mine, tiles, step):
        offsets, inside, place, here = tile(tiles - 1 - i, c, N, C, S, BN, BS, INT)
        centred = tl.load(x + offsets, inside, 0.0).to(V) - pivot
        past = tl.load(g + offsets, inside, 0.0).to(V)
        if RELU:
            past = tl.where(centred * scale + shift <= 0, 0.0, past)
        # The mean is taken off before scaling: a constant gradient leaves nothing, however large the scale
        if mask is None:
            values = centred * slope + level + (past - mean_g) * scale
        else:
            counts = tl.load(mask + place, here, 0) != 0
            values = tl.where(counts, centred * slope + level, 0.0) + (past - tl.where(counts, mean_g, 0.0)) * scale
        tl.store(dx + offsets, values, inside)
