"""The two passes over x of forward."""

import triton
import triton.language as tl

from syncbn.kernels.triton.statistics import is_last, keep_books, merge_rows, store_row, unshared
from syncbn.kernels.triton.tiles import COUNTS, VECTORS, affine, locate, tile, total_of


@triton.jit
def _store_local(packed, apart, c, C, count, mean, m2, between, holding, MESSAGE: tl.constexpr):
    if MESSAGE:
        # As moments.to_message has it
        total = count * mean
        store_row(packed, c, C, count, total, m2 + total * mean)
    else:
        store_row(packed, c, C, count, mean, m2)
    if apart is not None:
        tl.store(apart + c, between, c < C)
        tl.store(apart + C, holding.to(tl.float64))


@triton.jit(do_not_specialize=COUNTS)
def moments(
    x,
    mask,
    rows,
    counters,
    packed,
    apart,
    N,
    C,
    S,
    parts,
    size,
    MESSAGE: tl.constexpr,
    V: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    INT: tl.constexpr,
    BR: tl.constexpr,
):
    """packed [2C + 1]: the moments of x, which is one tensor [N, C, S], or one for each image.

    Each program takes every parts-th tile of one tensor. rows [parts of all tensors + groups, 2C + 1], counters
    [(groups + 1) * blocks]: for merging, in groups of so many parts; None where there is but one part. apart [C + 1]:
    Local.between_images, where each image is a tensor and a group.
    """
    row, block, c = locate(tl.num_programs(0), C, BC)
    x += (row // parts).to(tl.int64) * N * C * S
    tiles, t = tl.cdiv(N, BN) * tl.cdiv(S, BS), row % parts
    offsets, inside, place, here = tile(t, c, N, C, S, BN, BS, INT)
    if mask is not None:
        mask += (row // parts).to(tl.int64) * N * S
        here = here & (tl.load(mask + place, here, 0) != 0)
        # What is masked may be anything, and so no measure of where the values are
        while (tl.sum(here.to(tl.int32)) == 0) & (t + parts < tiles):
            t += parts
            offsets, inside, place, here = tile(t, c, N, C, S, BN, BS, INT)
            here = here & (tl.load(mask + place, here, 0) != 0)
        inside = inside & here
    # Squares about a value near the mean of the first tile lose nothing, however far it is from zero
    first = tl.load(x + offsets, inside, 0.0).to(V)
    share = 1 / tl.maximum(tl.sum(here.to(tl.int32)), 1).to(V)
    pivot = tl.sum(tl.sum(first, 2), 0) * share
    total, squares = tl.zeros([BN, BC, BS], V), tl.zeros([BN, BC, BS], V)
    count = tl.zeros([], tl.int32)
    counts = tl.zeros([BN, 1, BS], tl.int32)
    while t < tiles:
        offsets, inside, place, here = tile(t, c, N, C, S, BN, BS, INT)
        if mask is not None:
            here = here & (tl.load(mask + place, here, 0) != 0)
            inside = inside & here
            counts += here.to(tl.int32)
        else:
            columns = tl.cdiv(S, BS)
            rows_here = tl.minimum(BN, N - (t // columns).to(INT) * BN)
            count += (rows_here * tl.minimum(BS, S - (t % columns).to(INT) * BS)).to(tl.int32)
        values = tl.load(x + offsets, inside, 0.0).to(V) - pivot[None, :, None]
        values = tl.where(inside, values, 0.0)
        total += values
        squares += values * values
        t += parts
    count = (tl.sum(counts.to(tl.int64)) if mask is not None else count).to(tl.float64)
    offset = total_of(total) * (1 / tl.maximum(count, 1.0))
    mean = tl.where(count > 0, pivot.to(tl.float64) + offset, 0.0)
    m2 = total_of(squares) - offset * offset * count
    m2 = tl.where(m2 < 0, 0.0, m2)
    if rows is None:
        _store_local(packed, apart, c, C, count, mean, m2, tl.zeros([BC], tl.float64), count > 0, MESSAGE)
    else:
        length = 2 * C + 1
        store_row(rows + row * length, c, C, count, mean, m2)
        blocks = tl.cdiv(C, BC)
        total_rows = tl.num_programs(0) // blocks
        group, groups = row // size, tl.cdiv(total_rows, size)
        members = tl.minimum(size, total_rows - group * size)
        if is_last(counters + group * blocks + block, members):
            count, mean, m2, between, holding = merge_rows(rows + group * size * length, members, c, C, BR, BC)
            if groups == 1:
                _store_local(packed, apart, c, C, count, mean, m2, tl.zeros([BC], tl.float64), count > 0, MESSAGE)
            else:
                # Not in a part's place: programs of other channels may still read its count
                store_row(rows + (total_rows + group) * length, c, C, count, mean, m2)
                if is_last(counters + groups * blocks + block, groups):
                    count, mean, m2, between, holding = merge_rows(rows + total_rows * length, groups, c, C, BR, BC)
                    _store_local(packed, apart, c, C, count, mean, m2, between, holding, MESSAGE)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def normalize(
    x,
    residual,
    y,
    shared,
    stats,
    weight,
    bias,
    running_mean,
    running_var,
    batches,
    programs,
    N,
    C,
    S,
    eps: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    momentum: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    SUMMED: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    RELU: tl.constexpr,
    V: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    INT: tl.constexpr,
):
    """y = relu((x - mean) * invstd * weight + bias + residual); the first program keeps the books meanwhile."""
    if tl.program_id(0) == 0:
        keep_books(shared, stats, running_mean, running_var, batches, C, eps, momentum, SUMMED, CUMULATIVE)
    else:
        mine, _block, c = locate(programs, C, BC)
        count = tl.load(shared + 2 * C)
        mean, m2 = unshared(shared, count, c, C, SUMMED)
        invstd = tl.rsqrt((m2 * (1 / tl.maximum(count, 1.0)) + eps).to(V))
        pivot, scale, shift, _rest = affine(mean, invstd, weight, bias, c, C, V)
        tiles, step = tl.cdiv(N, BN) * tl.cdiv(S, BS), programs // tl.cdiv(C, BC)
        for i in range(mine, tiles, step):
            # From the end: what the pass before read last is still in the L2 cache
            offsets, inside, _place, _here = tile(tiles - 1 - i, c, N, C, S, BN, BS, INT)
            values = (tl.load(x + offsets, inside, 0.0).to(V) - pivot) * scale + shift
            if residual is not None:
                values += tl.load(residual + offsets, inside, 0.0).to(V)
            if RELU:
                # Unlike a maximum, it lets NaN through
                values = tl.where(values <= 0, 0.0, values)
            tl.store(y + offsets, values, inside)
