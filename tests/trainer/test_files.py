"""Temporary files: gone at the end, and those of the killed gone when the next one comes."""

import signal
import subprocess
import sys
import tempfile

import pytest

from syncbn.trainer.files import SCRATCH, scratch

MAKER = """
import time
from syncbn.trainer.files import scratch
with scratch() as folder:
    (folder / "config.yaml").touch()
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files of this process and those it starts."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_it_is_there_in_the_block_and_gone_after_it(temporary):
    with scratch() as folder:
        assert [*temporary.iterdir()] == [folder]
        (folder / "deep").mkdir()
    assert not [*temporary.iterdir()]


def test_it_is_gone_after_an_error(temporary):
    with pytest.raises(KeyError), scratch():
        raise KeyError
    assert not [*temporary.iterdir()]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_that_of_a_living_process_stays_and_that_of_a_killed_one_goes(temporary, end):
    maker = subprocess.Popen([sys.executable, "-c", MAKER], stdout=subprocess.PIPE, text=True)
    try:
        theirs = maker.stdout.readline().strip()
        with scratch() as mine:
            assert {str(path) for path in temporary.iterdir()} == {theirs, str(mine)}
        assert [str(path) for path in temporary.iterdir()] == [theirs]
    finally:
        maker.send_signal(end)
        maker.wait()
    assert [str(path) for path in temporary.iterdir()] == [theirs]
    with scratch() as mine:
        assert [*temporary.iterdir()] == [mine]


def test_what_is_no_such_folder_is_left_alone(temporary):
    (temporary / f"{SCRATCH}notes.txt").touch()
    (temporary / "other").mkdir()
    with scratch():
        pass
    assert {path.name for path in temporary.iterdir()} == {f"{SCRATCH}notes.txt", "other"}
