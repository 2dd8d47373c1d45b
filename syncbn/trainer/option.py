"""A key of the config: its default, what `python train.py --help` says of it, and its whole name."""

from collections.abc import Collection
from dataclasses import field
from typing import Any


def option(default: Any, text: str) -> Any:
    """A field of a section's dataclass. default: a value, or what makes one anew for each config (a list, say)."""
    if callable(default):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


def flat(config: dict[str, Any], prefix: str = "", whole: Collection[str] = ()) -> dict[str, Any]:
    """A nested config with its keys joined by dots. Mappings that hold nothing, and those of the keys `whole`, stay."""
    joined: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        nested = isinstance(value, dict) and value and key not in whole
        joined |= flat(value, f"{key}.", whole) if nested else {key: value}
    return joined
