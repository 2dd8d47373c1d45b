"""Two jobs with one run's name: real jobs, and one of them killed."""

import json
import os
import re

import pytest

from syncbn.trainer import status
from syncbn.trainer.runs import lock
from tests.launch.jobs import PYTHON, STANDALONE, finished, job, saved_steps

RUN = ["run.name=r", "launch.nproc=2", "train.steps=4000", "checkpoint.every=5", "train.log_every=5"]
RUN += ["wandb.mode=disabled", "launch.device=cpu", "drift.level=off"]
GRABBING = ["checkpoint.resume=none", "run.overwrite=true", "train.steps=3", "launch.max_restarts=2"]


def state(root):
    (seen,) = status.runs([root])
    return seen.state


def refusals(said):
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_the_second_job_is_refused_and_a_killed_one_holds_nothing(tmp_path):
    root = tmp_path / "runs"
    with job(PYTHON, *RUN, root=root) as first:
        first.until_saved(5)
        holder = lock.holder(root / "r")
        assert holder.pid == first.ranks[0]
        assert state(root) == "training"
        config = (root / "r" / "config.yaml").read_bytes()

        for door, ends in ((PYTHON, 2), ([*STANDALONE, "train.py"], 1)):  # torchrun has exit codes of its own
            code, said = finished(door, *RUN, *GRABBING, root=root)

            assert code == ends
            (line,) = refusals(said)
            assert f"r is in use by a job on host {os.uname().nodename}, pid {holder.pid}, since {holder.since}" in line
            assert "restart" not in said
            assert (root / "r" / "config.yaml").read_bytes() == config

        # It went on undisturbed meanwhile
        first.until_past(max(saved_steps(root / "r")) + 5)
        written = json.loads((root / "r" / "status.json").read_text())
        assert (written["state"], written["pid"], written["restarts"]) == ("training", holder.pid, 0)
        first.kill()
        assert first.left_over() == {}  # a process that is killed on a busy machine takes its time
    assert lock.holder(root / "r") is None
    assert state(root) == "died"

    with job(PYTHON, *RUN, root=root) as again:
        again.until(lambda: "going on from step" in again.said)
        assert "in use by" not in again.said
        assert lock.holder(root / "r").pid == again.ranks[0]
        again.until(lambda: json.loads((root / "r" / "status.json").read_text())["restarts"] == 1)


@pytest.mark.slow
def test_loaders_that_are_forked_do_not_keep_the_lock_of_a_killed_rank(tmp_path):
    root = tmp_path / "runs"
    with job(PYTHON, *RUN, "data.workers=2", "launch.max_restarts=1", root=root) as killed:
        killed.until_saved(5)
        os.kill(killed.ranks[0], 9)
        killed.until(lambda: "going on from step" in killed.said)
        assert "in use by" not in killed.said
        killed.until(lambda: state(root) == "training")
        (seen,) = status.runs([root])
        assert seen.status.restarts == 1
        assert re.search(r"restart 1 of 1", killed.said)
