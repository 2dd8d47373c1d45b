"""The work of one rank, behind one contract; nothing here communicates.

Four passes over x, of which nothing waits for the host; those behind a message also do what is to be done with it:

    moments(x, mask, form, per_image) -> Local                    local moments, packed in that form to be sent
    normalize(x, shared, affine, residual, running) -> y, stats   relu(weight * xhat + bias + residual)
    grad_sums(dy, x, stats, affine, y) -> Sums                    gradients past the relu, and their sums to be sent
    grad_input(g, x, stats, affine, sums, mask) -> dx             sums: those of the group

    update_running(running, stats)                                as in moments.py, in place; where normalize did not

Kernels that are WHOLE have a `forward` and a `backward` too, which do two of them each, and send the message in between
through a Wire: of a small map the calls cost more than what they do. If the message is not finished at once they return
what there is.

x, y, dy, g, dx and residual are [N, C, *S] and keep dtype and memory format. Everything per channel is [C]; shared,
stats and sums are float64, whatever x is, and (x - mean) keeps its digits however far mean is from zero. N or *S may be
empty: then moments and sums are zero. mask is a bool tensor that broadcasts to x, or None: moments are those of the
elements where it is True, which alone receive the gradient that flows through them.

shared: the sum of messages, [2C + 1], or rows, [W, 2C + 1]. stats: [3C + 1] = [mean | m2 | count | invstd] of the whole
batch, one tensor as it costs the host less than four; `unpacked` takes it apart.
"""

from typing import Any, Literal, NamedTuple, Protocol

import torch
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
    """How x becomes y: weight * (x - mean) / sqrt(var + eps) + bias, and then relu."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    relu: bool = False
    eps: float = 1e-5


class Running(NamedTuple):
    """The running buffers, and the weight of a new batch in them; None for the cumulative average."""

    mean: Tensor
    var: Tensor
    batches: Tensor
    momentum: float | None


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


def unpacked(stats: Tensor) -> tuple[Moments, Tensor]:
    """The Moments in stats, and invstd."""
    c, (mean, invstd) = stats.size(0) // 3, mean_and_invstd(stats)
    return Moments(stats[2 * c], mean, stats.narrow(0, c, c)), invstd


def mean_and_invstd(stats: Tensor) -> tuple[Tensor, Tensor]:
    c = stats.size(0) // 3
    # Not split: torch 2.11 cannot partition that in a compiled checkpoint
    return stats.narrow(0, 0, c), stats.narrow(0, 2 * c + 1, c)


def to_stats(moments: Moments, invstd: Tensor) -> Tensor:
    """[3C + 1], for `unpacked`."""
    return torch.cat([moments.mean, moments.m2, moments.count.view(1), invstd])


# Where C finds what adds up a message: shared_memory's mailbox_share and a mailbox; 0 for a rank that is alone
Wire = tuple[int, int]


class Slot(NamedTuple):
    """Where an observer keeps a forward.

    packed, between_images: of Local, the latter None if not asked for.
    addresses: of packed, between_images (or 0), [2C + 1] for the row of the whole batch, and [2C] for mean and var of
        the running buffers before they move, typed as they are.
    """

    packed: Tensor
    between_images: Tensor | None
    addresses: tuple[int, int, int, int]


class Stopped(NamedTuple):
    """Where `forward` came no further: at a message that is unfinished, or which check_count would refuse.

    shared: the sum of the messages, or the lone rank's row [1, 2C + 1]; not yet if answer, of share, is not 0.
    """

    local: Local
    shared: Tensor
    answer: int


class Backward(NamedTuple):
    """What `backward` came to.

    dx: as grad_input returns it, None if it was not wanted; without value yet if answer, of share, is not 0.
    dweight, dbias, g: as in Sums.
    """

    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    g: Tensor
    answer: int


class Kernels(Protocol):
    """A module that keeps the contract.

    NEEDS_Y: whether grad_sums needs y for any relu, or only where a residual was added.
    WHOLE: what has `forward` and `backward`, or None.
    """

    __name__: str

    @property
    def NEEDS_Y(self) -> bool: ...
    @property
    def WHOLE(self) -> "Whole | None": ...

    def moments(self, x: Tensor, mask: Tensor | None, form: Form, per_image: bool = False) -> Local: ...
    def normalize(
        self,
        x: Tensor,
        shared: Tensor,
        affine: Affine,
        residual: Tensor | None = None,
        running: Running | None = None,
        work: Any = None,
    ) -> tuple[Tensor, Tensor]: ...
    def update_running(self, running: Running, stats: Tensor) -> None: ...
    def grad_sums(self, dy: Tensor, x: Tensor, stats: Tensor, affine: Affine, y: Tensor | None) -> Sums: ...
    def grad_input(
        self, g: Tensor, x: Tensor, stats: Tensor, affine: Affine, sums: Tensor, mask: Tensor | None
    ) -> Tensor: ...


class Whole(Protocol):
    """Forward and backward, the message in between included. slot: where an observer has what it asks for."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        form: Form,
        affine: Affine,
        residual: Tensor | None,
        running: Running | None,
        wire: Wire,
        slot: Slot | None,
    ) -> tuple[Tensor, Tensor] | Stopped: ...
    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        stats: Tensor,
        affine: Affine,
        y: Tensor | None,
        mask: Tensor | None,
        wire: Wire,
        wants_dx: bool,
    ) -> Backward: ...
