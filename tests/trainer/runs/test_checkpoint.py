"""Checkpoints are whole or not there, and what is damaged is noticed."""

import errno
import hashlib
import io
import os
import pickle
import subprocess
import threading
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.trainer.errors import UserError
from syncbn.trainer.runs import checkpoint
from syncbn.trainer.runs.checkpoint import (
    SEAL,
    Checkpoints,
    Damaged,
    copied,
    parse_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from syncbn.trainer.runs.options import CheckpointConfig
from tests.launch.jobs import differing

STATE = {
    "step": 7,
    "model": {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3), "empty": torch.zeros(0)},
    "own": [{"random": (1, (2, 3), None), "text": "a/b\n√"}, {}],
    "figures": {"eval/loss": 0.1, "ok": True, "best": None, "inf": float("inf")},
}


def loaded(path):
    state = parse_checkpoint(read_checkpoint(path))
    assert state.pop("format") == checkpoint.FORMAT
    return state


def test_what_is_read_is_what_was_written(tmp_path):
    write_checkpoint(tmp_path / "a.pt", STATE)
    assert differing(loaded(tmp_path / "a.pt"), STATE) == []
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_torch_alone_can_read_it(tmp_path):
    write_checkpoint(tmp_path / "a.pt", STATE)
    for mmap in False, True:
        state = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
        assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "a.pt"
    write_checkpoint(path, STATE)
    return path.read_bytes()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_torn_or_flipped_file_is_taken(sound, tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["torn", "flipped", "longer", "zeroed"]))
    place = data.draw(st.integers(0, len(sound) - 1))
    if kind == "torn":
        content = sound[:place]
    elif kind == "flipped":
        content = sound[:place] + bytes([sound[place] ^ (1 << data.draw(st.integers(0, 7)))]) + sound[place + 1 :]
    elif kind == "zeroed":  # a page that never reached the disk
        content = sound[:place] + bytes(len(sound[place : place + 512])) + sound[place + 512 :]
    else:
        content = sound + data.draw(st.binary(min_size=1, max_size=100))
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(content)
    if content == sound:
        return
    with pytest.raises(Damaged):
        read_checkpoint(path)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=300) | st.builds(pickle.dumps, st.recursive(st.integers() | st.text(), st.lists)))
def test_no_content_however_sealed_is_more_than_refused(content):
    with pytest.raises(Damaged):
        parse_checkpoint(content)


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "model": Planted(tmp_path / "run")}, file)
    payload = file.getvalue()
    (tmp_path / "a.pt").write_bytes(payload + SEAL + hashlib.sha256(payload).hexdigest().encode())
    with pytest.raises(Damaged):
        parse_checkpoint(read_checkpoint(tmp_path / "a.pt"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object(), torch.Size([1])], ids=["bytes", "set", "object", "size"])
def test_what_could_not_be_read_back_is_not_written(tmp_path, value, caplog):
    shelf = Checkpoints(tmp_path)
    shelf.save(1, {"model": [value]})
    assert shelf.latest is None
    assert type(value).__name__ in shelf.problem


def states(folder):
    return sorted(path.name for path in folder.iterdir())


def step(n):
    return f"step_{n:09}.pt"


@pytest.mark.parametrize("background", [False, True])
def test_the_latest_few_and_the_best_are_kept(tmp_path, background):
    shelf = Checkpoints(tmp_path, keep=2, background=background)
    for n in range(1, 6):
        shelf.save(n, {"step": n}, best=n == 2)
    shelf.close()
    assert states(tmp_path) == ["best", "latest", step(2), step(4), step(5)]
    assert (shelf.latest.name, shelf.best.name) == (step(5), step(2))
    assert shelf.problem is None


class Killed(BaseException):
    """As a SIGKILL, but in this process."""


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("cut_at", ["best", "latest"])
def test_a_save_that_is_cut_off_leaves_no_other_best_and_no_more_files(tmp_path, monkeypatch, cut_at, keep):
    """Seen in a soak: killed behind latest, a run kept an old best and a checkpoint too many, for good."""
    shelf, real = Checkpoints(tmp_path, keep=keep), checkpoint.put_file
    for n in 1, 2:
        shelf.save(n, {"step": n})

    def put(path):
        if path.name == cut_at:
            raise Killed
        return real(path)

    monkeypatch.setattr(checkpoint, "put_file", put)
    with pytest.raises(Killed):
        shelf.save(3, {"step": 3}, best=True)
    monkeypatch.setattr(checkpoint, "put_file", real)
    again = Checkpoints(tmp_path, keep=keep)
    if again.latest.name != step(3):  # else it goes on from there, and never saves it again
        again.save(3, {"step": 3}, best=True)
    assert (again.latest.name, again.best.name) == (step(3), step(3))
    assert states(tmp_path) == ["best", "latest", *(step(n) for n in (2, 3)[-keep:])]


def test_saving_in_the_background_takes_the_state_of_then(tmp_path, monkeypatch):
    gate, weight = threading.Event(), torch.zeros(3)
    real = checkpoint.write_checkpoint
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda *args: (gate.wait(10), real(*args)))
    shelf = Checkpoints(tmp_path, background=True)
    shelf.save(1, {"model": {"weight": weight}})
    weight += 1
    assert shelf.latest is None, "it waited for the disk"
    gate.set()
    shelf.close()
    assert torch.equal(loaded(shelf.latest)["model"]["weight"], torch.zeros(3))


def test_a_damaged_file_is_told_and_the_one_before_it_taken(tmp_path, caplog):
    shelf = Checkpoints(tmp_path, keep=3)
    for n in 1, 2, 3:
        shelf.save(n, {"step": n})
    content = (tmp_path / step(3)).read_bytes()
    (tmp_path / step(3)).write_bytes(content[:100] + b"X" + content[101:])
    (tmp_path / step(2)).write_bytes(content[:200])

    path, payload = Checkpoints(tmp_path).newest_whole()

    assert (path.name, parse_checkpoint(payload)["step"]) == (step(1), 1)
    assert [record.message.split(" cannot")[0][-len(step(1)) :] for record in caplog.records] == [step(3), step(2)]
    # Gone on with from there, later steps are done again and their files no longer count
    shelf.save(2, {"step": 2})
    assert states(tmp_path) == ["latest", step(1), step(2)]


@pytest.mark.parametrize("pointer", [b"", b"step_000000009.pt", b"../x", b"\xff" * 1000, None])
def test_a_pointer_to_nothing_is_no_obstacle(tmp_path, pointer):
    shelf = Checkpoints(tmp_path)
    shelf.save(1, {"step": 1})
    shelf.save(2, {"step": 2})
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_bytes(pointer)
    assert Checkpoints(tmp_path).newest_whole()[0].name == step(2)


def test_a_pointer_to_an_earlier_one_is_obeyed(tmp_path):
    shelf = Checkpoints(tmp_path)
    for n in 1, 2:
        shelf.save(n, {"step": n})
    (tmp_path / "latest").write_text(step(1))
    assert Checkpoints(tmp_path).newest_whole()[0].name == step(1)


@contextmanager
def small_disk(folder, size):
    """A file system of its own, of so many bytes. Only root may have one."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_no_checkpoint_that_is_there(tmp_path, caplog):
    with small_disk(tmp_path, 400_000):
        shelf = Checkpoints(tmp_path, keep=2)
        shelf.save(1, {"weight": torch.zeros(20_000)}, best=True)
        before = states(tmp_path)

        shelf.save(2, {"weight": torch.zeros(200_000)})

        assert states(tmp_path) == before
        assert loaded(shelf.latest)["weight"].shape == (20_000,)
        assert "step 2" in shelf.problem
        assert "training goes on" in caplog.text
        shelf.save(3, {"weight": torch.zeros(20_000)})
        assert shelf.latest.name == step(3)
        assert shelf.problem is None


def test_a_folder_that_becomes_read_only_costs_no_more(tmp_path, caplog):
    with small_disk(tmp_path, 400_000):
        shelf = Checkpoints(tmp_path, background=True)
        shelf.save(1, {"step": 1})
        shelf.wait()
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        shelf.save(2, {"step": 2})
        shelf.close()
        assert "step 2" in shelf.problem
        assert os.strerror(errno.EROFS) in caplog.text
        assert loaded(shelf.latest)["step"] == 1


def test_a_copy_is_no_view():
    weight = torch.ones(2)
    copy = copied({"a": [weight], "b": (1, "x")})
    weight += 1
    assert torch.equal(copy["a"][0], torch.ones(2))
    assert copy["b"] == (1, "x")


@pytest.mark.parametrize("bad", [{"every": 0}, {"keep": 0}, {"resume": ""}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError, match=f"checkpoint.{next(iter(bad))}="):
        CheckpointConfig(**bad)
