"""Activation checkpointing runs a forward again within backward: then its statistics are remembered, not asked for.

The peers' part is the same the second time, so a second collective would be waste, and a second running update wrong
(pytorch#96136). Which forward it is that runs again is told by its place, never by its values, which may repeat: the
n-th call of a layer in a region that runs again is the n-th that the layer had when the region ran first. The books are
kept on what torch makes for each region, and live as long.
"""

import sys
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn


class Book:
    """The statistics of one layer's calls in one region, and how many of them each run since has had again."""

    def __init__(self) -> None:
        self.stats: list[Tensor] = []
        self.had: defaultdict[Any, int] = defaultdict(int)


def possible() -> bool:
    """Whether checkpointing may be about, so that `recall` and `remember` are to be called. Always cheap."""
    return _top_hooks() is not None or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1


def recall(layer: nn.Module) -> Tensor | None:
    """The layer's statistics, if the forward about to run ran before, else None; to be asked once for each forward.

    Raises RuntimeError if the region did not call the layer, or not so often, when it ran first.
    """
    _, again = _regions()
    if again is None:
        return None
    region, run = again
    book = _books(region).get(layer)
    had = 0 if book is None else book.had[run]
    if book is None or had == len(book.stats):
        raise RuntimeError(
            f"a checkpointed region that runs again in backward calls a SyncBatchNorm for the {had + 1}. time, "
            f"which it had called {had} times when it ran first: what it does must be the same both times"
        )
    book.had[run] += 1
    return book.stats[had]


def remember(layer: nn.Module, stats: Tensor) -> None:
    """Remember the statistics of the layer's forward that has just run, for as long as it may be run again."""
    # The regions around the one that runs again have had this call
    for region in _regions()[0]:
        _books(region).setdefault(layer, Book()).stats.append(stats)


def _books(region: Any) -> dict[nn.Module, Book]:
    books = getattr(region, "syncbn_books", None)
    if books is None:
        books = region.syncbn_books = {}
    return books


def _regions() -> tuple[list[Any], tuple[Any, Any] | None]:
    """The checkpointed regions that the forward stands in, up to one that runs again: that one, and a name of this run.

    A region is what torch makes of it: the context of a CheckpointFunction (torch's reentrant kind, and its kin in
    Megatron and DeepSpeed), or a _CheckpointFrame.
    """
    regions = []
    if (innermost := _hooked_region()) is not None:
        regions.append(innermost)
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        name = code.co_qualname
        if name.endswith("CheckpointFunction.backward"):
            return regions, (frame.f_locals[code.co_varnames[0]], torch._C._current_graph_task_id())
        if name == "_checkpoint_hook.__init__.<locals>.unpack_hook":
            return regions, (frame.f_locals["frame"], frame.f_locals["gid"])
        if name.endswith("CheckpointFunction.forward"):
            regions.append(frame.f_locals[code.co_varnames[0]])
        elif name == "checkpoint" and "gen" in frame.f_locals:
            # Of the regions one in another only the innermost is hooked
            maker = frame.f_locals["gen"].gi_frame
            region = None if maker is None else maker.f_locals.get("new_frame")
            if region is not None and region is not innermost:
                regions.append(region)
        frame = frame.f_back
    return regions, None


def _hooked_region() -> Any | None:
    """The non-reentrant region that hooks what is saved for backward."""
    hooks = _top_hooks()
    pack = None if hooks is None else hooks[0]
    if pack is None or getattr(pack, "__qualname__", "") != "_checkpoint_hook.__init__.<locals>.pack_hook":
        return None
    return dict(zip(pack.__code__.co_freevars, pack.__closure__, strict=True))["frame"].cell_contents


def _top_hooks() -> Any | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
