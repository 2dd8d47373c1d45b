"""Sweeps of real runs: killed, asked to end, refused in part; the same command goes on."""

import os
import signal
import time
from contextlib import suppress

import pytest

from syncbn.trainer.runs import sweep_folder
from tests.launch.jobs import PYTHON, descendants, figures, finished, job

pytestmark = pytest.mark.slow
SMALL = ["-m", "wandb.mode=disabled", "drift.level=off", "train.log_every=2", "launch.device=cpu"]


def folder_of(root):
    (folder,) = (path for path in root.iterdir() if path.name.startswith("sweep-"))
    return folder


def states(root):
    return [point.state for point in sweep_folder.read_sweep(folder_of(root)).points]


def results(root):
    return {path.parent.name: path.stat().st_mtime_ns for path in root.glob("*/result.json")}


def test_a_sweep_that_is_killed_is_continued_by_the_same_command(tmp_path):
    words = [*SMALL, "seed=0,1", "launch.nproc=1", "train.steps=90", "checkpoint.every=2"]
    with job([*PYTHON, *words], root=tmp_path / "runs") as sweep:
        root = sweep.root
        second = "digits-resnet8-sync-b4-train.steps_90-seed1"
        sweep.until_past(2, second)
        sweep.kill()
    before = results(root)
    assert len(before) == 1
    assert states(root) == ["finished", "not run"]
    code, said = finished([*PYTHON, *words], root=root)
    assert code == 0, said
    assert "is finished: its figures are in" in said
    assert "going on from step" in said
    after = results(root)
    assert len(after) == 2
    assert before.items() <= after.items()
    assert states(root) == ["finished", "finished"]
    assert [line["step"] for line in figures(root / second)][-1] == 90


def test_a_sweep_that_is_asked_to_end_saves_the_point_and_begins_no_other(tmp_path):
    words = [*SMALL, "seed=0,1", "launch.nproc=1", "train.steps=100000", "checkpoint.every=2"]
    with job([*PYTHON, *words], root=tmp_path / "runs") as sweep:
        sweep.until_past(2, "digits-resnet8-sync-b4-train.steps_100000-seed0")
        sweep.process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        assert sweep.wait() == 75, sweep.said
        assert sweep.left_over() == {}
    assert time.monotonic() - asked < 300
    assert "preempted at step" in sweep.said
    assert "point 2" not in sweep.said
    assert states(sweep.root) == ["preempted", "not run"]
    assert sweep.said.splitlines()[-1].startswith("1 preempted, 1 not run: the same command goes on")


def test_choices_that_cannot_be_are_refused_for_their_points_alone(tmp_path):
    one_value = ["model.name=tests.launch.nets:shrinking", "data.batch_per_rank=1"]
    words = [*SMALL, *one_value, "norm=torch,local,sync", "launch.nproc=2", "train.steps=2"]
    code, said = finished([*PYTHON, *words], root=tmp_path / "runs")
    assert code == 2, said
    reasons = {"torch": "norm=torch on cpu", "local": "norm=local has one value per channel"}
    for point, (norm, reason) in enumerate(reasons.items(), start=1):
        (line,) = (line for line in said.splitlines() if line.startswith(f"point {point} of 3 refused: {reason}"))
        refusal = line.partition(": ")[2]
        assert f"refused: {refusal} (norm={norm})" in said.splitlines()
    assert "error: " not in said
    assert "Traceback" not in said
    assert states(tmp_path / "runs") == ["refused", "refused", "finished"]


def test_joblib_trains_points_side_by_side(tmp_path):
    words = [*SMALL, "norm=local,sync", "launch.nproc=1", "train.steps=2"]
    code, said = finished([*PYTHON, *words], "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", root=tmp_path / "runs")
    assert code == 0, said
    assert states(tmp_path / "runs") == ["finished", "finished"]
    assert "Traceback" not in said
    code, said = finished([*PYTHON, *words], root=tmp_path / "runs")  # the same points, by whatever launcher
    assert (code, said.count("is finished: its figures are in")) == (0, 2)


def test_ctrl_c_has_all_points_save_that_joblib_trains_and_begins_no_other(tmp_path):
    words = [*SMALL, "seed=0,1,2", "launch.nproc=1", "train.steps=100000", "checkpoint.every=2"]
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    with job([*PYTHON, *words], *joblib, root=tmp_path / "runs") as sweep:
        for seed in 0, 1:
            sweep.until_past(2, f"digits-resnet8-sync-b4-train.steps_100000-seed{seed}")
        for pid in {sweep.process.pid} | descendants(sweep.process.pid):  # as a terminal does
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        assert sweep.wait() == 75, sweep.said
        assert sweep.left_over() == {}
    assert states(sweep.root) == ["preempted", "preempted", "not run"]
    assert sweep.said.count("preempted at step") == 2


def test_optuna_draws_points_that_are_trained(tmp_path):
    drawn = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "optim.lr=tag(log,interval(0.01,0.3))"]
    code, said = finished([*PYTHON, *SMALL, *drawn], "launch.nproc=1", "train.steps=2", root=tmp_path / "runs")
    assert code == 0, said
    assert "Traceback" not in said
    root = folder_of(tmp_path / "runs")
    points = sweep_folder.read_sweep(root).points
    assert [point.state for point in points] == ["finished"] * 3
    best = max(point.objective for point in points)
    assert f"best_value: {best}" in (root / "optimization_results.yaml").read_text()
