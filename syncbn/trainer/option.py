"""A key of the config: its default, what `python train.py --help` says of it, and its whole name."""

from dataclasses import field
from typing import Any


def option(default: Any, text: str) -> Any:
    """A field of a section's dataclass. default: a value, or what makes one anew for each config (a list, say)."""
    if callable(default):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config with its keys joined by dots."""
    joined: dict[str, Any] = {}
    for key, value in config.items():
        joined |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return joined
