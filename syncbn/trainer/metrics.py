"""Figures of a run: summed on the device, added over ranks in one message, written down as they come."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.trainer.world import World

log = logging.getLogger(__name__)


class Totals:
    """Named sums over batches, kept on the device in float64; reading them is the only wait."""

    def __init__(self, names: tuple[str, ...], world: World):
        self.names, self.world = names, world
        self.values = torch.zeros(len(names), dtype=torch.float64, device=world.device)
        self.skipped = 0
        self.step_losses: list[Tensor] = []

    def add(self, sums: dict[str, Tensor], skipped: int = 0) -> None:
        """Add the sums of a batch, and the number of images it had to do without."""
        self.values += torch.stack([sums[name].double() for name in self.names])
        self.skipped += skipped

    def add_step(self, loss: Tensor) -> None:
        """Keep a copy of the loss [] of one optimiser step on this rank."""
        self.step_losses.append(loss.to(torch.float64, copy=True))

    def reduce(self) -> tuple[dict[str, float], list[float]]:
        """The sums over all ranks, "skipped" among them, and each step's loss, summed too; then start again.

        Collective: one all_reduce; every rank must have added as many steps.
        """
        losses = [loss.view(1) for loss in self.step_losses]
        message = torch.cat([self.values, self.values.new_tensor([self.skipped]), *losses])
        figures = self.world.sum(message).tolist()
        self.values.zero_()
        self.skipped = 0
        self.step_losses.clear()
        names = (*self.names, "skipped")
        return dict(zip(names, figures, strict=False)), figures[len(names) :]


class Record:
    """metrics.jsonl, the record of truth: one object a line, written as it comes; every key carries its unit.

    What a full disk does not take is kept, and written as soon as there is room.
    """

    def __init__(self, path: Path):
        self.file = path.open("wb", buffering=0)
        self.began = time.monotonic()
        self.unwritten = b""
        self.warned = False

    def log(self, step: int, figures: dict[str, Any]) -> None:
        line = {"step": step, "time_s": round(time.monotonic() - self.began, 3), **figures}
        self.unwritten += json.dumps(line).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self.warned:
                log.warning(
                    "metrics.jsonl cannot be written (%s): figures are kept until it can, training goes on", error
                )
            self.warned = True

    def close(self) -> None:
        """Raises OSError if figures are still unwritten."""
        with self.file:
            self._write()
            os.fsync(self.file.fileno())

    def _write(self) -> None:
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
