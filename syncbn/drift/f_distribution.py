"""How likely chance alone would bring a statistic so far, where that is next to never."""

import torch
from torch import Tensor


def log_f_tail(f: Tensor, between: Tensor, within: Tensor) -> Tensor:
    """ln P(F > f) for F of (between, within) degrees of freedom; of a Student t, f = t² with between = 1 is |t|'s.

    NaN where f or a degree of freedom is no positive number.
    """
    f, between, within = torch.broadcast_tensors(*(t.double() for t in (f, between, within)))
    good = (f >= 0) & (between > 0) & (within > 0) & f.isfinite()
    a, b = (torch.where(good, t, 1.0) / 2 for t in (within, between))
    x = a / (a + b * torch.where(good, f, 1.0))
    # The continued fraction is quick below the mean
    swap = x > (a + 1) / (a + b + 2)
    small = _log_incomplete_beta(torch.where(swap, b, a), torch.where(swap, a, b), torch.where(swap, 1 - x, x))
    return torch.where(good, torch.where(swap, torch.log1p(-small.exp()), small), torch.nan)


def _log_incomplete_beta(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """ln I_x(a, b), regularised. Source: DLMF 8.17.22, evaluated as Lentz 1976 does."""
    tiny = 1e-300
    c, d = torch.ones_like(x), 1 / _away_from_0(1 - (a + b) * x / (a + 1), tiny)
    h = d
    for m in range(1, 20_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in even, odd:
            d = 1 / _away_from_0(1 + term * d, tiny)
            c = _away_from_0(1 + term / c, tiny)
            h = h * c * d
        if m % 8 == 0 and ((c * d - 1).abs() < 1e-13).all():
            break
    front = torch.xlogy(a, x) + b * torch.log1p(-x) - a.log()
    return front + torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b) + h.log()


def _away_from_0(v: Tensor, tiny: float) -> Tensor:
    return torch.where(v.abs() < tiny, tiny, v)
