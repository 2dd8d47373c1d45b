"""A key of the config: its default, and what `python train.py --help` says of it."""

from dataclasses import field
from typing import Any


def option(default: Any, text: str) -> Any:
    """A field of a section's dataclass. default: a value, or what makes one anew for each config (a list, say)."""
    if callable(default):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})
