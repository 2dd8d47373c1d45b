"""Ranks that are forked from a process that has imported torch, and what becomes of all when one of them goes."""

import os
import signal
import subprocess
import sys
import time
from unittest.mock import patch

import pytest

from syncbn.trainer.job import nursery, ranks
from tests.launch.jobs import PYTHON, ROOT, command_of, descendants, job, running

SMALL = ["launch.nproc=2", "wandb.mode=disabled", "data.workers=0", "run.name=r", "train.steps=1000000"]


def training(root, *more, **environment):
    return job(PYTHON, *SMALL, "checkpoint.every=10", *more, root=root, **environment)


def until_trains(started):
    started.until_past(10)
    return started.ranks, next(iter(started.nurseries))


def test_a_nursery_has_one_thread():
    """A fork has none of the others, and whatever locks they held it holds for ever."""
    imports = "; ".join(f"import {name}" for name in nursery.IMPORTED)
    code = f"{imports}; import os; print(len(os.listdir('/proc/self/task')))"
    environment = {**os.environ, **nursery.ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_ranks_are_forked_and_ps_shows_which_they_are(tmp_path):
    with training(tmp_path / "runs") as started:
        started_ranks, parent = until_trains(started)
        assert sorted(started_ranks) == [0, 1]
        for rank, pid in started_ranks.items():
            assert command_of(pid).startswith(f"syncbn: rank {rank} of 2, ")
            assert os.getpgid(pid) == pid
            assert pid in descendants(parent)


@pytest.mark.plain("launcher")
@pytest.mark.parametrize("victim", ["launcher", "nursery"])
def test_no_rank_outlives_what_it_was_forked_from(tmp_path, victim):
    with training(tmp_path / "runs") as started:
        _, parent = until_trains(started)
        everyone = descendants(started.process.pid)
        os.kill(parent if victim == "nursery" else started.process.pid, signal.SIGKILL)
        code = started.process.wait(60)
        assert code == (-signal.SIGKILL if victim == "launcher" else 1), started.said
        if victim == "nursery":
            assert "was ended by SIGKILL" in started.said
        started.seen |= everyone
        assert not started.left_over()


@pytest.mark.slow
def test_another_nursery_takes_the_place_of_one_that_was_killed(tmp_path):
    with training(tmp_path / "runs", "launch.max_restarts=1") as started:
        _, first = until_trains(started)
        os.kill(first, signal.SIGKILL)
        started.until(lambda: started.ranks and started.nurseries - {first})
        assert "restart 1 of 1" in started.said


@pytest.mark.ci
@pytest.mark.slow
def test_a_nursery_that_cannot_import_is_told(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('broken by a test')")
    with training(tmp_path / "runs", PYTHONPATH=f"{tmp_path}:{ROOT}") as started:
        assert started.process.wait(60) == 1
    assert "broken by a test" in started.said
    assert "error: what ranks are forked from has ended" in started.said


@pytest.mark.ci
@pytest.mark.slow
def test_a_signal_to_every_process_at_once_saves_the_run(tmp_path):
    """As Slurm sends it: to the processes of a job, whichever they are."""
    with training(tmp_path / "runs") as started:
        until_trains(started)
        for pid in {started.process.pid, *descendants(started.process.pid)}:
            os.kill(pid, signal.SIGTERM)
        assert started.wait(60) == 75, started.said
        assert not started.left_over()


@pytest.mark.slow
def test_a_rank_that_is_stopped_in_its_end_is_killed(tmp_path):
    with training(tmp_path / "runs") as started:
        running_ranks, _ = until_trains(started)
        os.kill(running_ranks[1], signal.SIGSTOP)
        os.kill(running_ranks[0], signal.SIGKILL)
        before = time.monotonic()
        assert started.wait(90) == 1, started.said
        assert time.monotonic() - before > 25
        assert "rank 0 was ended by SIGKILL" in started.said
        assert not started.left_over()


class Stuck:
    """A process that waits in the kernel, for a disk that is gone say."""

    pid = 2**22 + 1  # no process has it

    def poll(self):
        return None


def test_a_rank_that_the_kernel_cannot_end_is_given_up_and_counts_as_killed():
    named = {"PATIENCE_S": 0.2, "_start": lambda *_: Stuck(), "_over": lambda _: True}
    with patch.multiple(ranks, **named):
        assert ranks.run_ranks("config", 2, [], forked=False).exit_codes == {0: -9, 1: -9}


@pytest.mark.slow
def test_the_points_of_a_sweep_are_forked_from_one_nursery(tmp_path):
    words = ["-m", "seed=0,1", *SMALL[:3], "train.steps=2"]
    with job(PYTHON, *words, f"hydra.sweep.dir={tmp_path}/sweep", root=tmp_path / "runs") as started:
        nurseries = set()
        while started.process.poll() is None:
            nurseries |= started.nurseries
            time.sleep(0.02)
        assert started.process.returncode == 0, started.said
        assert len(nurseries) == 1
        assert not [pid for pid in nurseries if running(pid)]


@pytest.mark.ci
@pytest.mark.slow
def test_a_rank_has_the_environment_and_the_folder_of_its_launcher(tmp_path):
    code = (
        "import os; from syncbn.trainer.job.nursery import Nursery\n"
        "nursery = Nursery(); os.environ['RANK'] = '7'; os.chdir('..')\n"
        "rank = nursery.start('no.yaml', dict(os.environ))\n"
        "while rank.poll() is None: pass\n"
        "print(rank.poll()); nursery.close()"
    )
    (tmp_path / "here").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "here", env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "1", done.stderr
    assert "No such file or directory: 'no.yaml'" in (tmp_path / "reason7").read_text()
