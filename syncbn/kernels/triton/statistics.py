"""The statistics of channels, between the passes and within them: rows are merged, running buffers move.

The passes that add up are cut into parts, and every part leaves a row of float64. Rows are merged in the same launch,
in two levels: the last program of a group to finish merges the group's rows, the last group to finish those of all
groups. Who is last is told by a counter; in which order rows are merged is not, so every run has the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def is_last(counter, members):
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


@triton.jit
def add_rows(rows, R, c, C, BR: tl.constexpr, BC: tl.constexpr):
    """Both halves of the sum of rows [R, 2C]."""
    total, dot = tl.zeros([BR, BC], tl.float64), tl.zeros([BR, BC], tl.float64)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        inside = (r < R)[:, None] & (c < C)[None, :]
        row = rows + r[:, None] * (2 * C) + c[None, :]
        total += tl.load(row, inside, 0.0, cache_modifier=".cg")
        dot += tl.load(row + C, inside, 0.0, cache_modifier=".cg")
    return tl.sum(total, 0), tl.sum(dot, 0)


@triton.jit
def unshared(shared, count, c, C, SUMMED: tl.constexpr):
    """mean and m2 [BC] float64 of what the ranks shared: the sum of messages, or one row."""
    first, m2 = tl.load(shared + c, c < C, 0.0), tl.load(shared + C + c, c < C, 0.0)
    if not SUMMED:
        return first, m2
    mean = first * (1 / tl.maximum(count, 1.0))
    m2 -= first * mean
    return mean, tl.where(m2 < 0, 0.0, m2)


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
def keep_books(
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
        mean, m2 = unshared(shared, count, c, C, SUMMED)
        tl.store(stats + c, mean, c < C)
        tl.store(stats + C + c, m2, c < C)
        tl.store(stats + 2 * C + 1 + c, 1 / tl.sqrt(m2 * share + eps), c < C)
        if running_mean is not None:
            move_running(running_mean, running_var, c, C, count, mean, m2, rate)
    tl.store(stats + 2 * C, count)


@triton.jit(do_not_specialize=["R"])
def merge(rows, out, C, R, BR: tl.constexpr, BC: tl.constexpr):
    """out [2C + 1]: the row that R rows are together."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    count, mean, m2, _, _ = merge_rows(rows, R, c, C, BR, BC)
    store_row(out, c, C, count, mean, m2)


@triton.jit
def update_running(
    running_mean,
    running_var,
    batches,
    stats,
    C,
    momentum: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    CUMULATIVE: tl.constexpr,
):
    """As moments.update_running; one program, or the number of batches would be read and written at once."""
    count = tl.load(stats + 2 * C)
    rate = count_batch(batches, count, momentum, CUMULATIVE)
    for start in range(0, C, 512):
        c = start + tl.arange(0, 512)
        mean, m2 = tl.load(stats + c, c < C, 0.0), tl.load(stats + C + c, c < C, 0.0)
        move_running(running_mean, running_var, c, C, count, mean, m2, rate)
