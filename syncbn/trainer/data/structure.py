"""A batch as a structure of tensors: a tensor, a list of images of different sizes, boxes and masks in a dict."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def mapped(function: Callable[[Tensor], Any], structure: Any) -> Any:
    """The structure with the function's result in each tensor's place; what is no tensor stays as it is."""
    if isinstance(structure, Tensor):
        return function(structure)
    if isinstance(structure, Mapping):
        return {key: mapped(function, value) for key, value in structure.items()}
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(mapped(function, value) for value in structure))
    if isinstance(structure, list | tuple):
        return type(structure)(mapped(function, value) for value in structure)
    return structure


def tensors(structure: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Its tensors, each with where it is: "images", "labels.boxes", "images.0"."""
    if isinstance(structure, Tensor):
        yield name, structure
        return
    if isinstance(structure, Mapping):
        parts = structure.items()
    elif isinstance(structure, list | tuple):
        parts = zip(getattr(structure, "_fields", range(len(structure))), structure, strict=True)
    else:
        return
    for key, value in parts:
        yield from tensors(value, f"{name}.{key}".lstrip("."))


def repeated(structure: Any, samples: int) -> Any:
    """The structure of a batch, whose samples lie along the first dimension or in lists, with so many samples."""
    if isinstance(structure, Tensor):
        # cat keeps channels_last
        return torch.cat([structure] * -(-samples // len(structure)))[:samples] if structure.ndim else structure
    if isinstance(structure, list):
        return [structure[i % len(structure)] for i in range(samples)]
    if isinstance(structure, Mapping):
        return {key: repeated(value, samples) for key, value in structure.items()}
    if isinstance(structure, tuple):
        parts = [repeated(value, samples) for value in structure]
        return type(structure)(*parts) if hasattr(structure, "_fields") else tuple(parts)
    return structure
