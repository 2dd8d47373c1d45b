"""The passes over x, in Triton, as they run on the device; triton.py launches them.

A tensor lies in memory as [N, C, S], and a tile of it is [BN, BC, BS]; t counts tiles along N and S, and each program
has one block of BC channels. V is the dtype that values are computed in, INT that of offsets. What is None is left out.
"""

import triton
import triton.language as tl


@triton.jit
def channels(C, BC: tl.constexpr):
    """This program's number among those of its block of channels; the channels."""
    blocks = tl.cdiv(C, BC)
    return tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)


@triton.jit
def _channels_backwards(C, BC: tl.constexpr):
    """The same from the end: what the pass before read last is still in the L2 cache."""
    blocks, program = tl.cdiv(C, BC), tl.num_programs(0) - 1 - tl.program_id(0)
    return program // blocks, (program % blocks) * BC + tl.arange(0, BC)


@triton.jit
def _tile(t, c, N, C, S, BN: tl.constexpr, BS: tl.constexpr, INT: tl.constexpr):
    """Of tile t: offsets and whether they are inside, [BN, BC, BS]; the same for a mask, which has one channel."""
    columns = tl.cdiv(S, BS)
    n = (t // columns).to(INT) * BN + tl.arange(0, BN)
    s = (t % columns) * BS + tl.arange(0, BS)
    place, place_inside = n[:, None, None] * S + s[None, None, :], (n < N)[:, None, None] & (s < S)[None, None, :]
    offsets = (n[:, None, None] * C + c[None, :, None]) * S + s[None, None, :]
    return offsets, place_inside & (c < C)[None, :, None], place, place_inside


@triton.jit
def _sum(tile):
    """[BC] float64 of [BN, BC, BS]."""
    return tl.sum(tl.sum(tile, 2), 0).to(tl.float64)


@triton.jit
def _affine(mean, invstd, weight, bias, c, C, V: tl.constexpr):
    """pivot, scale, shift and rest [1, BC, 1] such that y = (x - pivot) * scale + shift, and pivot - mean = rest."""
    exact = tl.load(mean + c, c < C, 0.0)
    pivot = exact.to(V)
    rest = (pivot.to(tl.float64) - exact).to(V)
    scale = tl.load(invstd + c, c < C, 0.0).to(V)
    if weight is not None:
        scale *= tl.load(weight + c, c < C, 0.0).to(V)
    shift = rest * scale
    if bias is not None:
        shift += tl.load(bias + c, c < C, 0.0).to(V)
    return pivot[None, :, None], scale[None, :, None], shift[None, :, None], rest[None, :, None]


@triton.jit
def store_moments(out, c, C, count, mean, m2, MESSAGE: tl.constexpr):
    """As moments.to_message or moments.to_row has it."""
    total = count * mean
    tl.store(out + c, total if MESSAGE else mean, c < C)
    tl.store(out + C + c, m2 + total * mean if MESSAGE else m2, c < C)
    # Every block of channels writes the same count
    tl.store(out + 2 * C, count)


@triton.jit
def moments(
    x,
    mask,
    rows,
    N,
    C,
    S,
    parts,
    MESSAGE: tl.constexpr,
    V: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    INT: tl.constexpr,
):
    """rows [G * parts, 2C + 1]: the moments of every parts-th tile of each of the G tensors [N, C, S] in x."""
    row, c = channels(C, BC)
    x += (row // parts).to(tl.int64) * N * C * S
    tiles, t = tl.cdiv(N, BN) * tl.cdiv(S, BS), row % parts
    offsets, inside, place, here = _tile(t, c, N, C, S, BN, BS, INT)
    if mask is not None:
        mask += (row // parts).to(tl.int64) * N * S
        here = here & (tl.load(mask + place, here, 0) != 0)
        # What is masked may be anything, and so no measure of where the values are
        while (tl.sum(here.to(tl.int32)) == 0) & (t + parts < tiles):
            t += parts
            offsets, inside, place, here = _tile(t, c, N, C, S, BN, BS, INT)
            here = here & (tl.load(mask + place, here, 0) != 0)
        inside = inside & here
    # Squares about the mean of the first tile lose nothing, however far it is from zero
    first = tl.load(x + offsets, inside, 0.0).to(V)
    pivot = (_sum(first) / tl.maximum(tl.sum(here.to(tl.int32)), 1)).to(V)
    total, squares = tl.zeros([BN, BC, BS], V), tl.zeros([BN, BC, BS], V)
    counts = tl.zeros([BN, 1, BS], tl.int32)
    while t < tiles:
        offsets, inside, place, here = _tile(t, c, N, C, S, BN, BS, INT)
        if mask is not None:
            here = here & (tl.load(mask + place, here, 0) != 0)
            inside = inside & here
        values = tl.load(x + offsets, inside, 0.0).to(V) - pivot[None, :, None]
        values = tl.where(inside, values, 0.0)
        total += values
        squares += values * values
        counts += here.to(tl.int32)
        t += parts
    count = tl.sum(counts.to(tl.int64)).to(tl.float64)
    offset = _sum(total) / tl.maximum(count, 1.0)
    mean = tl.where(count > 0, pivot.to(tl.float64) + offset, 0.0)
    m2 = _sum(squares) - offset * offset * count
    store_moments(rows + row * (2 * C + 1), c, C, count, mean, tl.where(m2 < 0, 0.0, m2), MESSAGE)


@triton.jit
def normalize(
    x,
    residual,
    y,
    mean,
    invstd,
    weight,
    bias,
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
    """y = relu((x - mean) * invstd * weight + bias + residual)."""
    t, c = _channels_backwards(C, BC)
    offsets, inside, _, _ = _tile(t, c, N, C, S, BN, BS, INT)
    pivot, scale, shift, _ = _affine(mean, invstd, weight, bias, c, C, V)
    values = (tl.load(x + offsets, inside, 0.0).to(V) - pivot) * scale + shift
    if residual is not None:
        values += tl.load(residual + offsets, inside, 0.0).to(V)
    if RELU:
        # Unlike a maximum, it lets NaN through
        values = tl.where(values <= 0, 0.0, values)
    tl.store(y + offsets, values, inside)


@triton.jit
def store_sums(sums, dweight, dbias, c, C, total, dot, V: tl.constexpr):
    tl.store(sums + c, total, c < C)
    tl.store(sums + C + c, dot, c < C)
    if dweight is not None:
        tl.store(dweight + c, dot.to(V), c < C)
    if dbias is not None:
        tl.store(dbias + c, total.to(V), c < C)


@triton.jit
def grad_sums(
    dy,
    x,
    y,
    g,
    rows,
    dweight,
    dbias,
    mean,
    invstd,
    weight,
    bias,
    N,
    C,
    S,
    parts,
    RELU: tl.constexpr,
    V: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    INT: tl.constexpr,
):
    """rows [parts, 2C]: [sum g | sum g * xhat] of every parts-th tile; g = dy where relu let x through, stored if y."""
    row, c = channels(C, BC)
    pivot, scale, shift, rest = _affine(mean, invstd, weight, bias, c, C, V)
    total, dot = tl.zeros([BN, BC, BS], V), tl.zeros([BN, BC, BS], V)
    for t in range(row, tl.cdiv(N, BN) * tl.cdiv(S, BS), parts):
        offsets, inside, _, _ = _tile(t, c, N, C, S, BN, BS, INT)
        centred = tl.load(x + offsets, inside, 0.0).to(V) - pivot
        past = tl.load(dy + offsets, inside, 0.0).to(V)
        if y is not None:
            past = tl.where(tl.load(y + offsets, inside, 0.0) <= 0, 0.0, past)
            tl.store(g + offsets, past, inside)
        elif RELU:
            past = tl.where(centred * scale + shift <= 0, 0.0, past)
        total += past
        dot += past * centred
    sum_g, factor = _sum(total), tl.load(invstd + c, c < C, 0.0)
    dot_xhat = (_sum(dot) + tl.sum(tl.sum(rest, 2), 0).to(tl.float64) * sum_g) * factor
    store_sums(rows + row * (2 * C), dweight, dbias, c, C, sum_g, dot_xhat, V)


@triton.jit
def grad_input(
    g,
    x,
    mask,
    dx,
    mean,
    invstd,
    weight,
    bias,
    sums,
    count,
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
    t, c = _channels_backwards(C, BC)
    offsets, inside, place, here = _tile(t, c, N, C, S, BN, BS, INT)
    pivot, scale, shift, rest = _affine(mean, invstd, weight, bias, c, C, V)
    n = tl.maximum(tl.load(count), 1.0)
    mean_g = (tl.load(sums + c, c < C, 0.0) / n).to(V)[None, :, None]
    mean_g_xhat = tl.load(sums + C + c, c < C, 0.0) / n
    slope = -(tl.load(invstd + c, c < C, 0.0) * mean_g_xhat).to(V)[None, :, None] * scale
    centred = tl.load(x + offsets, inside, 0.0).to(V) - pivot
    past = tl.load(g + offsets, inside, 0.0).to(V)
    if RELU:
        past = tl.where(centred * scale + shift <= 0, 0.0, past)
    through_moments = centred * slope + (rest * slope - mean_g * scale)
    if mask is not None:
        through_moments = tl.where(tl.load(mask + place, here, 0) != 0, through_moments, 0.0)
    tl.store(dx + offsets, past * scale + through_moments, inside)
