"""Figures of a run: summed on the device, added over ranks in one message."""

from typing import Any

import torch
from torch import Tensor

from syncbn.trainer.world import World


class Totals:
    """Named sums over batches, kept on the device in float64; reading them is the only wait."""

    def __init__(self, names: tuple[str, ...], world: World):
        self.names, self.world = names, world
        self.values = torch.zeros(len(names), dtype=torch.float64, device=world.device)
        self.bad_steps = torch.zeros((), dtype=torch.float64, device=world.device)
        self.skipped = self.steps = 0

    def add(self, sums: dict[str, Tensor], skipped: int = 0, bad: Tensor | None = None) -> None:
        """Add the sums of a batch, unless it was part of a bad step, and the number of images it had to do without."""
        values = torch.stack([sums[name].double() for name in self.names])
        self.values += values if bad is None else values.masked_fill(bad, 0.0)
        self.skipped += skipped

    def add_step(self, bad: Tensor) -> None:
        """Count one optimiser step, which came to nothing if bad, [] bool; the same on every rank."""
        self.bad_steps += bad
        self.steps += 1

    def reduce(self) -> dict[str, float]:
        """The sums over all ranks, "skipped", "bad_steps" and "steps" too; then start again. Collective."""
        message = torch.cat([self.values, self.values.new_tensor([self.skipped]), self.bad_steps.view(1)])
        *figures, skipped, bad_steps = self.world.sum(message).tolist()
        counts = {"skipped": skipped, "bad_steps": bad_steps / self.world.size, "steps": self.steps}
        self.values.zero_()
        self.bad_steps.zero_()
        self.skipped = self.steps = 0
        return dict(zip(self.names, figures, strict=True)) | counts

    def state_dict(self) -> dict[str, Any]:
        """What this rank has added since it last started again."""
        return {"values": self.values, "bad_steps": self.bad_steps, "skipped": self.skipped, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values.copy_(state["values"])
        self.bad_steps.copy_(state["bad_steps"])
        self.skipped, self.steps = state["skipped"], state["steps"]
