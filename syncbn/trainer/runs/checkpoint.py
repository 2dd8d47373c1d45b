"""Checkpoints on disk: each whole or not there, sealed by a checksum, the latest few and the best of them kept."""

import hashlib
import io
import logging
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from syncbn.trainer.errors import first_line
from syncbn.trainer.files import put_file

log = logging.getLogger(__name__)

FORMAT = 1
SEAL = b"\nsyncbn sha256 "  # before the digest, behind what torch wrote, whose readers do not mind


class Damaged(Exception):
    """A file that is not, or no longer, what was written."""


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state so that path holds, at every moment, either nothing, the old file or the new one whole.

    state: tensors, numbers, text, and lists and dicts of them: what can be read back without running any code.
    """
    with put_file(path) as file:
        sealed = _Sealed(file)
        torch.save({"format": FORMAT, **state}, sealed)  # pyright: ignore[reportArgumentType]  (it writes, and flushes)
        file.write(SEAL + sealed.digest.hexdigest().encode())


def read_checkpoint(path: Path) -> bytes:
    """The bytes of a checkpoint, once its checksum has been verified; `parse_checkpoint` makes the state of them.

    Raises Damaged, or OSError.
    """
    content = path.read_bytes()
    end = max(0, len(content) - len(SEAL) - 2 * hashlib.sha256().digest_size)
    if not content.startswith(SEAL, end):
        raise Damaged(f"{path} is damaged: its checksum is missing")
    if hashlib.sha256(memoryview(content)[:end]).hexdigest().encode() != content[end + len(SEAL) :]:
        raise Damaged(f"{path} is damaged: its checksum is wrong")
    return content


def parse_checkpoint(payload: bytes) -> dict[str, Any]:
    """The state in a checkpoint's bytes, on the CPU; nothing in them is executed. Raises Damaged."""
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers raise many kinds
        raise Damaged(f"it holds no state ({type(error).__name__})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise Damaged("it holds no checkpoint of this version")
    return state


class Checkpoints:
    """The checkpoints of a run, in a folder: `step_<step>.pt`, and the pointers `latest` and `best`.

    Args:
        keep: how many of the latest stay. With None nothing is ever removed.
        background: `save` returns at once and a thread writes; the next save waits for it.

    A save that fails is told in a warning and in `problem`; the files that are there stay.
    """

    def __init__(self, folder: Path, *, keep: int | None = None, background: bool = False):
        self.folder, self.keep = folder, keep
        self.problem: str | None = None  # why the latest save failed
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._writing: Future[None] | None = None

    def save(self, step: int, state: dict[str, Any], *, best: bool = False) -> None:
        """Write the state, as it is now, as the latest checkpoint, and perhaps as the best so far."""
        self.wait()
        try:
            state = copied(state)
        except Exception as error:  # of a model that has odd things in its state
            self._failed(step, error)
            return
        if self._thread is None:
            self._save(step, state, best)
        else:
            self._writing = self._thread.submit(self._save, step, state, best)

    def wait(self) -> None:
        """Return once nothing is being written."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        self.wait()
        if self._thread:
            self._thread.shutdown()

    @property
    def latest(self) -> Path | None:
        """The file that `latest` points to, else the one of the highest step."""
        return next(iter(self._candidates()), None)

    @property
    def best(self) -> Path | None:
        return pointed(self.folder / "best")

    def newest_whole(self, check: Callable[[Path], bytes] = read_checkpoint) -> tuple[Path, bytes] | None:
        """The latest checkpoint that is whole, and its bytes; each one that is not is told in a warning."""
        for path in self._candidates():
            try:
                payload = check(path)
                parse_checkpoint(payload)
                return path, payload
            except (Damaged, OSError) as error:
                log.warning("%s cannot be used (%s): taking the checkpoint before it", path, error)
        return None

    def _save(self, step: int, state: dict[str, Any], best: bool) -> None:
        path = self.folder / f"step_{step:09}.pt"
        try:
            write_checkpoint(path, state)
            if best:
                self._point("best", path)
            self._remove_old(path)
            # Last: a run that is killed before it goes on from the checkpoint before, and does all of this again
            self._point("latest", path)
            self.problem = None
        except Exception as error:  # whatever it is, training goes on
            self._failed(step, error)

    def _point(self, pointer: str, path: Path) -> None:
        with put_file(self.folder / pointer) as file:
            file.write(path.name.encode())

    def _failed(self, step: int, error: Exception) -> None:
        self.problem = f"no checkpoint of step {step} ({first_line(error)})"
        log.warning("%s: training goes on, the one before it stays", self.problem)

    def _remove_old(self, saved: Path) -> None:
        """Remove what is too many, and what an earlier process wrote of later steps, which are now done again."""
        if self.keep is not None:
            others = [path for path in self._candidates() if path != saved]
            earlier = [path for path in others if path.name < saved.name]
            for path in others:
                if path not in earlier[: self.keep - 1] and path != self.best:
                    path.unlink()

    def _candidates(self) -> list[Path]:
        """All checkpoints, the latest first."""
        steps = {path: int(path.stem[5:]) for path in self.folder.glob("step_*.pt") if path.stem[5:].isdecimal()}
        latest = pointed(self.folder / "latest")
        return sorted(steps, key=lambda path: (path == latest, steps[path]), reverse=True)


def pointed(pointer: Path) -> Path | None:
    """The checkpoint that a pointer, `latest` or `best`, points to; None if it is no pointer to one that is there."""
    with suppress(OSError), pointer.open("rb") as file:
        name = file.read(100).decode(errors="replace")
        if re.fullmatch(r"step_\d+\.pt", name) and pointer.with_name(name).is_file():
            return pointer.with_name(name)
    return None


def copied(state: Any) -> Any:
    """A copy of a state on the CPU, which training cannot change. TypeError: `parse_checkpoint` would refuse it."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {copied(key): copied(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(copied, state))
    if state is None or type(state) in (bool, int, float, str):
        return state
    raise TypeError(f"a state holds {type(state).__name__}: it must be tensors, numbers, text, lists and dicts")


class _Sealed:
    """What torch.save writes to: passes all on, and takes its checksum on the way."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
