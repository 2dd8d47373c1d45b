"""Figures of a run: summed on the device, added over ranks in one message, written down as they come."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
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


class Record:
    """metrics.jsonl, the record of truth: one object a line, written as it comes; every key carries its unit.

    What a full disk does not take is kept, and written as soon as there is room.
    """

    def __init__(self, path: Path, state: dict[str, Any] | None = None):
        """state: of the record that is gone on with; what it wrote later is cut off. None: a new record."""
        state = state or {"written": 0, "unwritten": "", "time_s": 0.0}
        self.path = path
        self.file = path.open("ab", buffering=0)
        if self.file.tell() > state["written"]:
            self.file.truncate(state["written"])
        self.unwritten: bytes = state["unwritten"].encode()
        self.began = time.monotonic() - state["time_s"]
        self.warned = False

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, once the disk has all that was written: a checkpoint is never ahead of it."""
        with suppress(OSError):
            os.fsync(self.file.fileno())
        written = os.fstat(self.file.fileno()).st_size
        return {"written": written, "unwritten": self.unwritten.decode(), "time_s": self.time_s}

    @property
    def time_s(self) -> float:
        """Seconds of training, those of earlier processes included."""
        return time.monotonic() - self.began

    def log(self, step: int, figures: dict[str, Any]) -> None:
        line = {"step": step, "time_s": round(self.time_s, 3), **figures}
        self.unwritten += json.dumps(line).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self.warned:
                log.warning(
                    "metrics.jsonl cannot be written (%s): figures are kept until it can, training goes on", error
                )
            self.warned = True

    def numbers(self) -> Iterator[tuple[int, dict[str, float]]]:
        """The step and the numbers of each line so far, but for its time; a line that is damaged is passed over."""
        for text in (self.path.read_bytes() + self.unwritten).splitlines():
            try:
                line = json.loads(text)
                step, _ = line.pop("step"), line.pop("time_s")
            except (ValueError, LookupError, TypeError, AttributeError):
                continue
            yield step, {name: value for name, value in line.items() if type(value) in (int, float)}

    def close(self) -> None:
        """Raises OSError if figures are still unwritten."""
        with self.file:
            self._write()
            os.fsync(self.file.fileno())

    def _write(self) -> None:
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
