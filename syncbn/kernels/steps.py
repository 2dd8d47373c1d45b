"""The steps over channels between the passes, in Triton: small matrices of float64 that are merged or added up."""

import triton
import triton.language as tl

from syncbn.kernels.passes import channels, store_moments, store_sums


@triton.jit
def merge(
    rows,
    out,
    invstd,
    C,
    R,
    eps: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    SUMMED: tl.constexpr,
    MESSAGE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """out [2C + 1]: what R rows [R, 2C + 1] are together (Chan et al.), or what a sum of messages holds; invstd [C]."""
    _, c = channels(C, BC)
    if SUMMED:
        count = tl.load(rows + 2 * C)
        mean = tl.load(rows + c, c < C, 0.0) / tl.maximum(count, 1.0)
        m2 = tl.load(rows + C + c, c < C, 0.0) - count * mean * mean
        m2 = tl.where(m2 < 0, 0.0, m2)
    else:
        count = tl.zeros([], tl.float64)
        mean, m2 = tl.zeros([BC], tl.float64), tl.zeros([BC], tl.float64)
        for start in range(0, R, BR):
            r = start + tl.arange(0, BR)
            row, inside = rows + r[:, None] * (2 * C + 1), (r < R)[:, None] & (c < C)[None, :]
            n = tl.load(row + 2 * C, (r < R)[:, None], 0.0)
            means, m2s = tl.load(row + c[None, :], inside, 0.0), tl.load(row + C + c[None, :], inside, 0.0)
            more = tl.sum(n)
            mean_of_more = tl.sum(n * means, 0) / tl.maximum(more, 1.0)
            apart = means - mean_of_more[None, :]
            share, delta = more / tl.maximum(count + more, 1.0), mean_of_more - mean
            m2 += tl.sum(m2s + n * apart * apart, 0) + delta * delta * count * share
            mean += delta * share
            count += more
    store_moments(out, c, C, count, mean, m2, MESSAGE)
    if invstd is not None:
        tl.store(invstd + c, 1 / tl.sqrt(m2 / tl.maximum(count, 1.0) + eps), c < C)


@triton.jit
def between_images(rows, out, C, N, P, BR: tl.constexpr, BC: tl.constexpr):
    """out [C + 1]: Local.between_images, of N images in P rows each, [N, P, 2C + 1]."""
    _, c = channels(C, BC)
    count, holding = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    mean, apart = tl.zeros([BC], tl.float64), tl.zeros([BC], tl.float64)
    for start in range(0, N, BR):
        i = start + tl.arange(0, BR)
        n, total = tl.zeros([BR], tl.float64), tl.zeros([BR, BC], tl.float64)
        for part in range(P):
            row, inside = rows + (i * P + part)[:, None] * (2 * C + 1), (i < N)[:, None]
            values = tl.load(row + 2 * C, inside, 0.0)
            n += tl.sum(values, 1)
            total += values * tl.load(row + c[None, :], inside & (c < C)[None, :], 0.0)
        more = tl.sum(n)
        mean_of_more = tl.sum(total, 0) / tl.maximum(more, 1.0)
        distance = total / tl.maximum(n, 1.0)[:, None] - mean_of_more[None, :]
        share, delta = more / tl.maximum(count + more, 1.0), mean_of_more - mean
        apart += tl.sum(n[:, None] * distance * distance, 0) + delta * delta * count * share
        mean += delta * share
        count += more
        holding += tl.sum(tl.where(n > 0, 1.0, 0.0).to(tl.float64))
    tl.store(out + c, apart, c < C)
    # Every block of channels writes the same number
    tl.store(out + C, holding)


@triton.jit
def update_running(
    running_mean,
    running_var,
    num_batches_tracked,
    count,
    mean,
    m2,
    C,
    momentum: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    CUMULATIVE: tl.constexpr,
    BC: tl.constexpr,
):
    """As moments.update_running; one program, or the number of batches would be read and written at once."""
    n, batches = tl.load(count), tl.load(num_batches_tracked)
    seen = n > 0
    batches += seen.to(tl.int64)
    rate = 1 / tl.maximum(batches.to(tl.float64), 1.0) if CUMULATIVE else tl.full([], momentum, tl.float64)
    step = tl.where(seen, rate, 0.0)
    tl.debug_barrier()
    tl.store(num_batches_tracked, batches)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        old_mean, old_var = tl.load(running_mean + c, c < C), tl.load(running_var + c, c < C)
        new_mean, new_var = tl.load(mean + c, c < C), tl.load(m2 + c, c < C) / tl.maximum(n - 1, 1.0)
        # An empty batch leaves them as they were, even what is not finite
        moved_mean = tl.where(seen, old_mean + step * (new_mean - old_mean), old_mean)
        moved_var = tl.where(seen, old_var + step * (new_var - old_var), old_var)
        tl.store(running_mean + c, moved_mean, c < C)
        tl.store(running_var + c, moved_var, c < C)


@triton.jit
def add_sums(rows, sums, dweight, dbias, C, R, V: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """sums [2C] of rows [R, 2C]."""
    _, c = channels(C, BC)
    total, dot = tl.zeros([BR, BC], tl.float64), tl.zeros([BR, BC], tl.float64)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        inside = (r < R)[:, None] & (c < C)[None, :]
        offsets = r[:, None] * (2 * C) + c[None, :]
        total += tl.load(rows + offsets, inside, 0.0)
        dot += tl.load(rows + C + offsets, inside, 0.0)
    store_sums(sums, dweight, dbias, c, C, tl.sum(total, 0), tl.sum(dot, 0), V)
