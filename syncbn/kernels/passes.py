"""The passes over x, in Triton, as they run on the device; triton.py launches them.

A tensor lies in memory as [N, C, S], and a tile of it is [BN, BC, BS]; t counts tiles along N and S, and each program
has one block of BC channels. V is the dtype that values are computed in, INT that of offsets. What is None is left out.
Divisions in float64 take some 40 instructions, so each program makes one and multiplies by it.

The passes that add up are cut into parts, and every part leaves a row of float64. Rows are merged in the same launch,
in two levels: the last program of a group to finish merges the group's rows, the last group to finish those of all
groups. Who is last is told by a counter; in which order rows are merged is not, so every run has the same bits.
"""

import triton
import triton.language as tl

# Ints that change from batch to batch: without this Triton would compile anew where one is 1 or divisible by 16. And
# pointers that need not be aligned to 16 bytes: of vectors, where wide loads bring nothing
COUNTS = ["N", "parts", "size"]
VECTORS = ["shared", "sums", "weight", "bias", "running_mean", "running_var", "batches"]


@triton.jit
def _mine(programs, C, BC: tl.constexpr):
    """Of so many programs, this one's number among those of its block of channels; the block; its channels."""
    blocks = tl.cdiv(C, BC)
    program = tl.program_id(0) - (tl.num_programs(0) - programs)
    return program // blocks, program % blocks, (program % blocks) * BC + tl.arange(0, BC)


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
def _last(counter, members):
    """Whether this is the last of so many programs to come by; what the others stored is there to be read."""
    # The release below covers what this thread stored, the barrier what its neighbours did
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == members - 1
    if last:
        # As the next launch wants to find it
        tl.store(counter, 0)
    return last


@triton.jit
def store_row(out, c, C, count, mean, m2):
    """As moments.to_row has it. Every block of channels writes the same count."""
    tl.store(out + c, mean, c < C)
    tl.store(out + C + c, m2, c < C)
    tl.store(out + 2 * C, count)


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


@triton.jit
def merge_rows(rows, R, c, C, BR: tl.constexpr, BC: tl.constexpr):
    """What R rows [R, 2C + 1] are together (Chan et al.): count, mean, m2; between them; how many hold a value."""
    count, holding = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    mean, within, between = tl.zeros([BC], tl.float64), tl.zeros([BC], tl.float64), tl.zeros([BC], tl.float64)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        row, inside = rows + r[:, None] * (2 * C + 1), (r < R)[:, None] & (c < C)[None, :]
        # Past the first-level cache, which knows nothing of what other programs stored
        n = tl.load(row + 2 * C, (r < R)[:, None], 0.0, cache_modifier=".cg")
        means = tl.load(row + c[None, :], inside, 0.0, cache_modifier=".cg")
        m2s = tl.load(row + C + c[None, :], inside, 0.0, cache_modifier=".cg")
        more = tl.sum(n)
        mean_of_more = tl.sum(n * means, 0) * (1 / tl.maximum(more, 1.0))
        apart = means - mean_of_more[None, :]
        share, delta = more / tl.maximum(count + more, 1.0), mean_of_more - mean
        within += tl.sum(m2s, 0)
        between += tl.sum(n * apart * apart, 0) + delta * delta * count * share
        mean += delta * share
        count += more
        holding += tl.sum(tl.where(n > 0, 1.0, 0.0).to(tl.float64))
    return count, mean, within + between, between, holding


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
    row, block, c = _mine(tl.num_programs(0), C, BC)
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
    # Squares about a value near the mean of the first tile lose nothing, however far it is from zero
    first = tl.load(x + offsets, inside, 0.0).to(V)
    share = 1 / tl.maximum(tl.sum(here.to(tl.int32)), 1).to(V)
    pivot = tl.sum(tl.sum(first, 2), 0) * share
    total, squares = tl.zeros([BN, BC, BS], V), tl.zeros([BN, BC, BS], V)
    count = tl.zeros([], tl.int32)
    counts = tl.zeros([BN, 1, BS], tl.int32)
    while t < tiles:
        offsets, inside, place, here = _tile(t, c, N, C, S, BN, BS, INT)
        if mask is not None:
            here = here & (tl.load(mask + place, here, 0) != 0)
            inside = inside & here
            counts += here.to(tl.int32)
        else:
            columns = tl.cdiv(S, BS)
            count += tl.minimum(BN, N - t // columns * BN) * tl.minimum(BS, S - t % columns * BS)
        values = tl.load(x + offsets, inside, 0.0).to(V) - pivot[None, :, None]
        values = tl.where(inside, values, 0.0)
        total += values
        squares += values * values
        t += parts
    count = (tl.sum(counts.to(tl.int64)) if mask is not None else count).to(tl.float64)
    offset = _sum(total) * (1 / tl.maximum(count, 1.0))
    mean = tl.where(count > 0, pivot.to(tl.float64) + offset, 0.0)
    m2 = _sum(squares) - offset * offset * count
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
        if _last(counters + group * blocks + block, members):
            count, mean, m2, between, holding = merge_rows(rows + group * size * length, members, c, C, BR, BC)
            if groups == 1:
                _store_local(packed, apart, c, C, count, mean, m2, tl.zeros([BC], tl.float64), count > 0, MESSAGE)
            else:
                # Not in a part's place: programs of other channels may still read its count
                store_row(rows + (total_rows + group) * length, c, C, count, mean, m2)
                if _last(counters + groups * blocks + block, groups):
                    count, mean, m2, between, holding = merge_rows(rows + total_rows * length, groups, c, C, BR, BC)
                    _store_local(packed, apart, c, C, count, mean, m2, between, holding, MESSAGE)


@triton.jit
def _shared(shared, count, c, C, SUMMED: tl.constexpr):
    """mean and m2 [BC] float64 of what the ranks shared: the sum of messages, or one row."""
    first, m2 = tl.load(shared + c, c < C, 0.0), tl.load(shared + C + c, c < C, 0.0)
    if not SUMMED:
        return first, m2
    mean = first * (1 / tl.maximum(count, 1.0))
    m2 -= first * mean
    return mean, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def _affine(mean, invstd, weight, bias, c, C, V: tl.constexpr):
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
def _affine_of(stats, weight, bias, c, C, V: tl.constexpr):
    """_affine with the mean and invstd that `normalize` left behind."""
    mean, invstd = tl.load(stats + c, c < C, 0.0), tl.load(stats + 2 * C + 1 + c, c < C, 0.0)
    return _affine(mean, invstd, weight, bias, c, C, V)


@triton.jit
def move_running(running_mean, running_var, c, C, count, mean, m2, rate):
    """As moments.update_running; an empty batch leaves them as they were, even what is not finite."""
    seen = count > 0
    old_mean, old_var = tl.load(running_mean + c, c < C), tl.load(running_var + c, c < C)
    var = m2 * (1 / tl.maximum(count - 1, 1.0))
    tl.store(running_mean + c, tl.where(seen, old_mean + rate * (mean - old_mean), old_mean), c < C)
    tl.store(running_var + c, tl.where(seen, old_var + rate * (var - old_var), old_var), c < C)


@triton.jit
def count_batch(batches, count, momentum, CUMULATIVE: tl.constexpr):
    """Count the batch, unless it is empty; the rate at which it moves the running buffers."""
    number = tl.load(batches) + (count > 0).to(tl.int64)
    # All threads have read it before one of them writes
    tl.debug_barrier()
    tl.store(batches, number)
    return 1 / tl.maximum(number.to(tl.float64), 1.0) if CUMULATIVE else tl.full([], momentum, tl.float64)


@triton.jit
def _keep_books(
    shared,
    stats,
    running_mean,
    running_var,
    batches,
    C,
    eps,
    momentum,
    SUMMED: tl.constexpr,
    CUMULATIVE: tl.constexpr,
):
    """stats [3C + 1] = [mean | m2 | count | invstd] of the whole batch, and the running buffers."""
    count = tl.load(shared + 2 * C)
    rate = 0.0
    if running_mean is not None:
        rate = count_batch(batches, count, momentum, CUMULATIVE)
    share = 1 / tl.maximum(count, 1.0)
    for start in range(0, C, 512):
        c = start + tl.arange(0, 512)
        mean, m2 = _shared(shared, count, c, C, SUMMED)
        tl.store(stats + c, mean, c < C)
        tl.store(stats + C + c, m2, c < C)
        tl.store(stats + 2 * C + 1 + c, 1 / tl.sqrt(m2 * share + eps), c < C)
        if running_mean is not None:
            move_running(running_mean, running_var, c, C, count, mean, m2, rate)
    tl.store(stats + 2 * C, count)


@triton.jit(do_not_specialize=[*COUNTS, "programs"], do_not_specialize_on_alignment=VECTORS)
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
        _keep_books(shared, stats, running_mean, running_var, batches, C, eps, momentum, SUMMED, CUMULATIVE)
    else:
        mine, _block, c = _mine(programs, C, BC)
        count = tl.load(shared + 2 * C)
        mean, m2 = _shared(shared, count, c, C, SUMMED)
        invstd = tl.rsqrt((m2 * (1 / tl.maximum(count, 1.0)) + eps).to(V))
        pivot, scale, shift, _rest = _affine(mean, invstd, weight, bias, c, C, V)
        tiles, step = tl.cdiv(N, BN) * tl.cdiv(S, BS), programs // tl.cdiv(C, BC)
        for i in range(mine, tiles, step):
            # From the end: what the pass before read last is still in the L2 cache
            offsets, inside, _place, _here = _tile(tiles - 1 - i, c, N, C, S, BN, BS, INT)
            values = (tl.load(x + offsets, inside, 0.0).to(V) - pivot) * scale + shift
            if residual is not None:
                values += tl.load(residual + offsets, inside, 0.0).to(V)
            if RELU:
                # Unlike a maximum, it lets NaN through
                values = tl.where(values <= 0, 0.0, values)
            tl.store(y + offsets, values, inside)


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


@triton.jit
def _add_rows(rows, R, c, C, BR: tl.constexpr, BC: tl.constexpr):
    """Both halves of the sum of rows [R, 2C]."""
    total, dot = tl.zeros([BR, BC], tl.float64), tl.zeros([BR, BC], tl.float64)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        inside = (r < R)[:, None] & (c < C)[None, :]
        row = rows + r[:, None] * (2 * C) + c[None, :]
        total += tl.load(row, inside, 0.0, cache_modifier=".cg")
        dot += tl.load(row + C, inside, 0.0, cache_modifier=".cg")
    return tl.sum(total, 0), tl.sum(dot, 0)


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
    row, block, c = _mine(tl.num_programs(0), C, BC)
    pivot, scale, shift, rest = _affine_of(stats, weight, bias, c, C, V)
    total, dot = tl.zeros([BN, BC, BS], V), tl.zeros([BN, BC, BS], V)
    for t in range(row, tl.cdiv(N, BN) * tl.cdiv(S, BS), parts):
        offsets, inside, _place, _here = _tile(t, c, N, C, S, BN, BS, INT)
        centred = tl.load(x + offsets, inside, 0.0).to(V) - pivot
        past = tl.load(dy + offsets, inside, 0.0).to(V)
        if y is not None:
            past = tl.where(tl.load(y + offsets, inside, 0.0) <= 0, 0.0, past)
            tl.store(g + offsets, past, inside)
        elif RELU:
            past = tl.where(centred * scale + shift <= 0, 0.0, past)
        total += past
        dot += past * centred
    sum_g, sum_dot = _sum(total), _sum(dot) + tl.sum(tl.sum(rest, 2), 0).to(tl.float64) * _sum(total)
    sum_dot *= tl.load(stats + 2 * C + 1 + c, c < C, 0.0)
    if rows is None:
        _store_gradients(packed, dweight, dbias, c, C, sum_g, sum_dot, V)
    else:
        length = 2 * C
        _store_sums(rows + row * length, c, C, sum_g, sum_dot)
        group, groups = row // size, tl.cdiv(parts, size)
        members = tl.minimum(size, parts - group * size)
        if _last(counters + group * tl.cdiv(C, BC) + block, members):
            sum_g, sum_dot = _add_rows(rows + group * size * length, members, c, C, BR, BC)
            if groups == 1:
                _store_gradients(packed, dweight, dbias, c, C, sum_g, sum_dot, V)
            else:
                _store_sums(rows + (parts + group) * length, c, C, sum_g, sum_dot)
                if _last(counters + groups * tl.cdiv(C, BC) + block, groups):
                    sum_g, sum_dot = _add_rows(rows + parts * length, groups, c, C, BR, BC)
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
    mine, _block, c = _mine(tl.num_programs(0), C, BC)
    pivot, scale, shift, rest = _affine_of(stats, weight, bias, c, C, V)
    share = 1 / tl.maximum(tl.load(stats + 2 * C), 1.0)
    mean_g = (tl.load(sums + c, c < C, 0.0) * share).to(V)[None, :, None]
    mean_g_xhat = tl.load(sums + C + c, c < C, 0.0) * share
    slope = -(tl.load(stats + 2 * C + 1 + c, c < C, 0.0) * mean_g_xhat).to(V)[None, :, None] * scale
    level = rest * slope - mean_g * scale
    tiles, step = tl.cdiv(N, BN) * tl.cdiv(S, BS), tl.num_programs(0) // tl.cdiv(C, BC)
    for i in range(mine, tiles, step):
        offsets, inside, place, here = _tile(tiles - 1 - i, c, N, C, S, BN, BS, INT)
        centred = tl.load(x + offsets, inside, 0.0).to(V) - pivot
        past = tl.load(g + offsets, inside, 0.0).to(V)
        if RELU:
            past = tl.where(centred * scale + shift <= 0, 0.0, past)
        through_moments = centred * slope + level
        if mask is not None:
            through_moments = tl.where(tl.load(mask + place, here, 0) != 0, through_moments, 0.0)
        tl.store(dx + offsets, past * scale + through_moments, inside)
