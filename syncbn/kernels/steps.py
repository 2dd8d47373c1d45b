"""Two steps over channels, in Triton, that only some layers need: those that gather, and those that are observed."""

import triton
import triton.language as tl

from syncbn.kernels.passes import count_batch, merge_rows, move_running, store_row


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
