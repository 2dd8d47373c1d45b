"""metrics.jsonl, the record of truth of a run."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


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
