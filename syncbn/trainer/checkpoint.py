"""The state of a training on disk: written beside the old one, then put in its place."""

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the state so that path holds, at every moment, either the old or the new one whole."""
    beside = path.with_suffix(".tmp")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a state back on the CPU; nothing in the file is executed."""
    return torch.load(path, map_location="cpu", weights_only=True)
