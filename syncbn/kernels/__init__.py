"""The work of one rank, behind one contract of four functions; nothing here communicates.

    moments(x, mask) -> Moments, work
    normalize(x, mean, invstd, weight, bias, work) -> y
    grad_sums(dy, x, mean, invstd) -> [2C] = [sum dy | sum dy * xhat]
    grad_input(dy, x, mean, invstd, weight, mean_dy, mean_dy_xhat, mask) -> dx

x, y, dy, dx are [N, C, *S] and keep dtype and memory format. Everything per channel is [C]; mean, invstd, moments and
sums are float64, whatever x is, and (x - mean) keeps its digits however far mean is from zero. N or *S may be empty:
then moments and sums are zero. mask is a bool tensor that broadcasts to x, or None: moments are those of the elements
where it is True, which alone receive the gradient that flows through them. work is what moments leaves for the
normalize of the same x, which may overwrite it; None will do.
"""

from types import ModuleType

from torch import Tensor

from syncbn.kernels import eager


def choose(x: Tensor) -> ModuleType:
    """The kernels for x's device."""
    return eager
