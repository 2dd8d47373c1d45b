"""Jobs that are killed at random moments: they come to what an undisturbed one comes to, and leave nothing behind."""

import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

from tests.launch.soak.blows import kill
from tests.launch.soak.run import Soak, differences, temporary

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def soak():
    """An undisturbed run to compare with; its folder stays if a test fails."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))  # not pytest's, whose long names leave no room for sockets
    made = Soak(folder, steps=20, seed=1)
    made.undisturbed()
    yield made
    if set(folder.glob("*/r")) == {made.whole}:
        shutil.rmtree(folder)


def test_five_kills_change_no_bit_and_leave_nothing_behind(soak):
    soak.killed(5)
    assert len(soak.blows) == 5


def test_a_rank_that_is_killed_is_started_again_by_itself(soak):
    soak.restarted()


def test_a_launcher_killed_while_its_ranks_start_leaves_none_of_them(soak):
    with soak.life("orphans") as life:
        life.start(restarts=0)
        life.until(lambda: len(life.members()[0]) == 2, "ranks")
        kill(life.job.process.pid)
        deadline = time.monotonic() + 120  # they first import torch
        while life.ours():
            assert time.monotonic() < deadline
            assert life.step == 0, "an orphan trains"
            time.sleep(0.1)
    shutil.rmtree(life.root, ignore_errors=True)


def test_sigterm_while_ranks_start_ends_the_job_whatever_restarts_it_has(soak):
    with soak.life("asked") as life:
        life.start(restarts=5)
        life.until(lambda: len(life.members()[0]) == 2, "ranks")
        time.sleep(0.3)
        kill(life.job.process.pid, signal.SIGTERM)
        code = life.job.wait()
        assert code == 75 or (code, life.step) == (128 + signal.SIGTERM, 0)  # by then they may train, hear it, and save
        assert not life.ours()
        assert temporary(life) <= soak.usual
    shutil.rmtree(life.root, ignore_errors=True)


def test_the_comparison_sees_a_bit(soak):
    assert not differences(soak.whole, soak.whole)
    other = soak.whole.with_name("other")
    shutil.copytree(soak.whole, other)
    metrics = other / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"train/loss": 2.', '"train/loss": 3.', 1))
    (other / "checkpoints" / "step_000000099.pt.tmp").touch()
    parts = differences(soak.whole, other)
    shutil.rmtree(other)
    assert parts == ["metrics.jsonl[0].train/loss", "files: ['checkpoints/step_000000099.pt.tmp']"]
