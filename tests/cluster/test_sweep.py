"""A sweep through hydra/launcher=submitit_slurm on a real Slurm: a job for each point."""

import json
import pickle
import re
import subprocess
from contextlib import contextmanager

import pytest

from tests.cluster.slurm import COMMANDS, LONG_S, PACKAGES, Submitted, two_nodes, until
from tests.cluster.tools import require
from tests.launch.jobs import PYTHON, ROOT, figures

pytestmark = pytest.mark.cluster

SWEEP = [
    *PYTHON, "-m", "hydra/launcher=submitit_slurm", "launch.device=cpu", "wandb.mode=disabled", "train.steps=12",
    "train.log_every=2", "checkpoint.every=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def slurm():
    require(*COMMANDS, packages=PACKAGES, root=True)
    with two_nodes() as started:
        yield started


@contextmanager
def sweeping(slurm, log, *words, **environment):
    """A sweep in the background."""
    with log.open("w") as file:
        sweep = subprocess.Popen(
            [*SWEEP, *words], cwd=ROOT, env={**slurm.environment, **environment}, stdout=file, stderr=file
        )
    try:
        yield sweep
    finally:
        sweep.kill()
        sweep.wait()


def folder_of(root):
    """The sweep's own folder."""
    (folder,) = (path for path in root.iterdir() if path.name.startswith("sweep-"))
    return folder


def job_of(slurm, root, point, name):
    """The job of a point, which is a task of the sweep's array of jobs."""
    (own,) = (folder_of(root) / ".submitit").glob(f"*_{point}")
    return Submitted(slurm, own.name, root / name, own / f"{own.name}_0_log.out")


def returned(root, point):
    """What came back to the sweeper from a point."""
    (result,) = (folder_of(root) / ".submitit").glob(f"*_{point}/*_result.pkl")
    outcome, job_return = pickle.loads(result.read_bytes())
    assert outcome == "success"
    return job_return.return_value


def test_each_point_is_a_job_that_goes_on_if_preempted_and_its_result_comes_back(slurm, tmp_path):
    root, hold, log = tmp_path / "runs", tmp_path / "hold", tmp_path / "log"
    hold.write_text("1")
    names = [f"digits-tests.launch.nets.Held-{norm}-b4-train.steps_12-seed0" for norm in ("local", "sync")]
    words = ["norm=local,sync", "model.name=tests.launch.nets:Held", "launch.nproc=2", f"run.root={root}"]
    with sweeping(slurm, log, *words, SYNCBN_TEST_HOLD=str(hold), PYTHONPATH=str(ROOT)) as sweep:
        until(lambda: (root / names[1]).exists() or sweep.poll(), log.read_text, LONG_S)
        preempted = job_of(slurm, root, 1, names[1])
        preempted.until_past(3)
        slurm.ask("scancel", "--signal=USR2", preempted.number)  # as Slurm does before a time limit: submitit asks so
        preempted.until_queued_again()
        hold.unlink()
        preempted.start_now()
        assert sweep.wait(LONG_S) == 0, log.read_text()
    assert f"going on from step {preempted.preempted_at()}" in preempted.said
    assert {path.name for path in root.iterdir()} == {*names, folder_of(root).name}
    for point, name in enumerate(names):
        result = json.loads((root / name / "result.json").read_text())
        assert (result["ranks"], result["objective"]) == (2, returned(root, point))
        assert [line["step"] for line in figures(root / name)] == [2, 4, 6, 8, 10, 12, 12]


def test_a_point_that_fails_is_named_with_the_place_of_what_it_said_and_the_others_are_done(slurm, tmp_path):
    done = slurm.run(*SWEEP, "model.name=resnet21,resnet8", "launch.nproc=1", f"run.root={tmp_path}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("refused: "))
    assert line.startswith("refused: model.name=resnet21: no such model")
    (said,) = re.findall(r"what it said is in (.+)\) \(model\.name=resnet21\)$", line)
    assert said == str(job_of(slurm, tmp_path, 0, "").log.parent)
    (log,) = folder_of(tmp_path).glob(".submitit/*_0/*_0_log.err")
    assert "point 1 of 2 refused: model.name=resnet21: no such model" in log.read_text()
    assert [path.parent.name for path in tmp_path.glob("*/result.json")] == [
        "digits-resnet8-sync-b4-train.steps_12-seed0"
    ]
