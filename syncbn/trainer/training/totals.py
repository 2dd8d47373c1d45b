"""Figures of a run: summed on the device, added over ranks in one message."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.trainer.world import World


class Totals:
    """Named sums over batches, kept on the device in float64; reading them is the only wait.

    shapes: of each sum, by name, the same on every rank.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], world: World):
        self.shapes, self.world = dict(shapes), world
        sizes = sum(math.prod(shape) for shape in self.shapes.values())
        self.values = torch.zeros(sizes, dtype=torch.float64, device=world.device)
        self.bad_steps = torch.zeros((), dtype=torch.float64, device=world.device)
        self.images = self.skipped = self.steps = 0

    def add(self, sums: dict[str, Tensor], images: int, skipped: int = 0, bad: Tensor | None = None) -> None:
        """Add the sums of a batch, unless it was part of a bad step; its images, and those it had to do without."""
        values = torch.cat([sums[name].double().reshape(-1) for name in self.shapes])
        self.values += values if bad is None else values.masked_fill(bad, 0.0)
        self.images += images
        self.skipped += skipped

    def add_step(self, bad: Tensor) -> None:
        """Count one optimiser step, which came to nothing if bad, [] bool; the same on every rank."""
        self.bad_steps += bad
        self.steps += 1

    def reduce(self) -> "Reduced":
        """The sums over all ranks; then start again. Collective."""
        counts = self.values.new_tensor([self.images, self.skipped])
        message = self.world.sum(torch.cat([self.values, counts, self.bad_steps.view(1)])).cpu()
        values, (images, skipped, bad_steps) = message[:-3], message[-3:].tolist()
        pieces = values.split([math.prod(shape) for shape in self.shapes.values()])
        sums = {name: piece.view(self.shapes[name]) for name, piece in zip(self.shapes, pieces, strict=True)}
        reduced = Reduced(sums, images, skipped, bad_steps / self.world.size, self.steps)
        self.values.zero_()
        self.bad_steps.zero_()
        self.images = self.skipped = self.steps = 0
        return reduced

    def state_dict(self) -> dict[str, Any]:
        """What this rank has added since it last started again."""
        counts = {"images": self.images, "skipped": self.skipped, "steps": self.steps}
        return {"values": self.values, "bad_steps": self.bad_steps, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values.copy_(state["values"])
        self.bad_steps.copy_(state["bad_steps"])
        self.images = state.get("images", 0)  # checkpoints had none before 2026-11-28
        self.skipped, self.steps = state["skipped"], state["steps"]


class Reduced(NamedTuple):
    """Sums over batches and ranks, float64 on the CPU, and how much they are of; skipped: images."""

    sums: dict[str, Tensor]
    images: float
    skipped: float
    bad_steps: float
    steps: int
