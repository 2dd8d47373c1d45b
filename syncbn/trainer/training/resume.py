"""What a run leaves for the process that goes on with it, and how that one finds it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from syncbn.trainer import environment
from syncbn.trainer.data import Data
from syncbn.trainer.errors import UserError, some
from syncbn.trainer.redact import redacted
from syncbn.trainer.runs.checkpoint import Checkpoints, Damaged, parse_checkpoint, pointed, read_checkpoint
from syncbn.trainer.runs.folder import RunFolder, differences
from syncbn.trainer.training.state import State, Training, best_weights
from syncbn.trainer.world import World

log = logging.getLogger(__name__)


class Shelf(Protocol):
    """Where rank 0 puts checkpoints."""

    def keep(self, step: int, state: State, *, best: bool) -> None: ...


class Keeper:
    """Saves a training: every rank has one and tells what it has for itself, rank 0 writes."""

    def __init__(self, ranks: World, shelf: Shelf | None):
        self.ranks, self.shelf = ranks, shelf

    def save(self, training: Training, *, best: bool = False) -> None:
        """Save it as it is now. Collective."""
        state = training.state(self.ranks)
        if self.shelf:
            self.shelf.keep(training.step, state, best=best)


@dataclass
class Start:
    """Where a run begins.

    state: that of an earlier process. own: whether it is this run's, or another's that this one takes as its start.
    """

    state: State
    path: Path
    own: bool

    @property
    def global_batch(self) -> int | None:
        """The images of each forward, which a run keeps on any number of ranks."""
        return self.state["global_batch"] if self.own else None

    @property
    def watch(self) -> State | None:
        return self.state["watch"] if self.own else None

    def changed(self, data: Data) -> list[str]:
        """In what the data differs from what the state was trained on."""
        before, now = self.state["data"], data.fingerprint
        return [f"{name} {before[name]} -> {now[name]}" for name in now if now[name] != before.get(name)]

    @property
    def best_weights(self) -> dict[str, Tensor]:
        """Those that were evaluated: of the average, if there is one."""
        return best_weights(self.state)

    def refuse_other_classes(self, data: Data) -> None:
        """Raise UserError if the data has another number of classes; warn of any other difference."""
        classes = self.state["classes"]
        if len(data.classes) != len(classes):
            raise UserError(
                f"{self.path} tells {len(classes)} classes apart and the data has {len(data.classes)}: "
                "give data with the classes that it was trained on"
            )
        changed = self.changed(data)
        if data.classes != classes:
            before, now = (some(names, 10) for names in (classes, data.classes))
            changed.append(f"classes {before} -> {now}, taken in this order")
        if changed:
            log.warning("the data is not that of %s (%s)", self.path, ", ".join(changed))

    def take_up(self, training: Training, ranks: World, *, seed: int) -> None:
        """Put the training where the state was left. No rank speaks to another. UserError: it is another's state."""
        try:
            training.go_on_from(self.state, ranks, seed=seed)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            why = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
            raise UserError(
                f"{self.path} does not fit this run ({why}): give a checkpoint of the same model and optimiser, or "
                "model.weights=FILE for what fits of its weights"
            ) from error

    def refuse_changed(self, data: Data) -> None:
        """Raise UserError if the training data is not what the state was trained on."""
        if changed := self.changed(data):
            raise UserError(
                f"the data has changed since {self.path} was written ({', '.join(changed)}): put it back as it was, or "
                "begin anew with checkpoint.resume=none, with model.weights=FILE if the weights are to be kept"
            )


def find_start(resume: str, folder: RunFolder, config: dict[str, Any], ranks: World) -> Start | None:
    """What checkpoint.resume asks for; None if the run is to begin anew. Collective.

    Rank 0 reads it, as the others may not see its disk. A checkpoint of the run's own comes before a given path: a
    restart goes on, whatever it was that it began with.

    Raises UserError, on every rank, if there is nothing at the path, or nothing whole where there is something.
    """
    return _shared(lambda: _find_checkpoint(resume, folder, config), ranks)


def refuse_missing(resume: str, folder: RunFolder, config: dict[str, Any]) -> None:
    """Raise UserError, as `find_start` does, if the run is to begin at a path where there is nothing."""
    if resume not in ("auto", "none") and not Path(resume).exists() and not folder.holds(config):
        _checkpoint_at(Path(resume))


def find_start_at(path: Path, ranks: World) -> Start:
    """The checkpoint that `load_checkpoint` finds, on every rank, as the run sees it that wrote it. Collective.

    Raises UserError, on every rank, if there is none that is whole.
    """
    start = _shared(lambda: (*_checkpoint_at(path), True), ranks)
    assert start
    return start


def load_to_evaluate(resume: str) -> tuple[Path, State]:
    """The checkpoint that checkpoint.resume names for task=evaluate, as `load_checkpoint` has it.

    Raises UserError if it names none, and as that does.
    """
    path = Path(resume)
    if str(path) in ("auto", "none", "."):
        raise UserError("task=evaluate evaluates a checkpoint: give checkpoint=FILE, or a run's folder, runs/NAME")
    return load_checkpoint(path)


def load_checkpoint(path: Path) -> tuple[Path, State]:
    """The checkpoint in a file or at a pointer, or the latest in a run's folder.

    Raises UserError if there is none that is whole.
    """
    path, payload = _checkpoint_at(path)
    return path, parse_checkpoint(payload)


def _shared(find: Callable[[], tuple[Path, bytes, bool] | None], ranks: World) -> Start | None:
    """What rank 0 finds, on every rank. Collective."""
    shared: tuple[Path, bytes, bool] | None = None
    with ranks.together():
        if ranks.rank == 0:
            shared = find()
    shared = ranks.from_rank_0(shared)
    if shared is None:
        return None
    path, payload, own = shared
    return Start(parse_checkpoint(payload), path, own)


def _find_checkpoint(resume: str, folder: RunFolder, config: dict[str, Any]) -> tuple[Path, bytes, bool] | None:
    if resume == "none" and not environment.restarts():
        return None
    if folder.holds(config) and (newest := _newest(folder.checkpoints)):
        path, payload = newest
        # Another run's may be left by a process that was killed while it took over the folder
        if not differences(parse_checkpoint(payload).get("config", {}), redacted(config)):
            return path, payload, True
    return None if resume in ("auto", "none") else (*_checkpoint_at(Path(resume)), False)


def _checkpoint_at(path: Path) -> tuple[Path, bytes]:
    if path.is_dir():
        inside = path / "checkpoints"
        if newest := _newest(inside if inside.is_dir() else path):
            return newest
        raise UserError(f"{path} holds no checkpoint: give a file, such as runs/NAME/checkpoints/step_000000100.pt")
    path = pointed(path) or path
    try:
        payload = read_checkpoint(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a checkpoint or the folder of a run") from None
    except Damaged as error:
        raise UserError(f"{error}: give another checkpoint") from None
    try:
        parse_checkpoint(payload)
    except Damaged as error:
        raise UserError(f"{path} cannot be used ({error}): give another checkpoint") from None
    return path, payload


def _newest(checkpoints: Path) -> tuple[Path, bytes] | None:
    shelf = Checkpoints(checkpoints)
    newest = shelf.newest_whole()
    if newest is None and shelf.latest:
        raise UserError(
            f"no checkpoint in {checkpoints} is whole: put one there from a copy, or checkpoint.resume=none begins anew"
        )
    return newest
