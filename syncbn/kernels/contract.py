"""The work of one rank, behind one contract; nothing here communicates.

Four passes over x, and between them two steps over channels, of which nothing waits for the host:

    moments(x, mask, form, per_image) -> Local                  local moments, packed in that form to be sent
    statistics(shared, eps) -> Moments, invstd                  shared: the sum of messages [2C+1], or rows [W, 2C+1]
    update_running(...)                                         as in moments.py, in place
    normalize(x, affine, residual, work) -> y                   relu(weight * xhat + bias + residual)
    grad_sums(dy, x, affine, y) -> Sums                         gradients past the relu, and their sums to be sent
    grad_input(g, x, affine, sums, count, mask) -> dx           sums: those of the group

x, y, dy, g, dx and residual are [N, C, *S] and keep dtype and memory format. Everything per channel is [C]; mean,
invstd, moments and sums are float64, whatever x is, and (x - mean) keeps its digits however far mean is from zero. N or
*S may be empty: then moments and sums are zero. mask is a bool tensor that broadcasts to x, or None: moments are those
of the elements where it is True, which alone receive the gradient that flows through them.
"""

from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from syncbn.moments import Moments

Form = Literal["message", "row"]


class Local(NamedTuple):
    """What `moments` finds in x.

    packed: [2C + 1], see moments.to_message and moments.to_row.
    work: for the normalize of the same x, which may overwrite it; None will do.
    between_images: [C + 1] float64, Σ_i n_i (mean_i - mean)² over images, and how many images hold a value; only if
        asked for.
    """

    packed: Tensor
    work: Any = None
    between_images: Tensor | None = None


class Affine(NamedTuple):
    """How x becomes y: weight * (x - mean) * invstd + bias, and then relu."""

    mean: Tensor
    invstd: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    relu: bool = False


class Sums(NamedTuple):
    """What `grad_sums` finds in dy and x.

    packed: [2C] float64 = [sum g | sum g * xhat], to be sent; it may be overwritten.
    dweight, dbias: [C], the same as the gradients of weight and bias, typed as they are; None where they are.
    g: the gradient past the relu, also residual's. Without y the relu is still to be applied to it, by grad_input.
    """

    packed: Tensor
    dweight: Tensor | None
    dbias: Tensor | None
    g: Tensor


class Kernels(Protocol):
    """A module that keeps the contract.

    NEEDS_Y: whether grad_sums needs y for any relu, or only where a residual was added.
    """

    @property
    def NEEDS_Y(self) -> bool: ...

    def moments(self, x: Tensor, mask: Tensor | None, form: Form, per_image: bool = False) -> Local: ...
    def statistics(self, shared: Tensor, eps: float) -> tuple[Moments, Tensor]: ...
    def update_running(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        num_batches_tracked: Tensor,
        moments: Moments,
        momentum: float | None,
    ) -> None: ...
    def normalize(self, x: Tensor, affine: Affine, residual: Tensor | None, work: Any) -> Tensor: ...
    def grad_sums(self, dy: Tensor, x: Tensor, affine: Affine, y: Tensor | None) -> Sums: ...
    def grad_input(
        self, g: Tensor, x: Tensor, affine: Affine, sums: Tensor, count: Tensor, mask: Tensor | None
    ) -> Tensor: ...
