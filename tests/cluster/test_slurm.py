"""launch/slurm.sbatch on a real Slurm of two nodes: it trains over both, and goes on after whatever ends it."""

import json
import os
import re

import pytest

from tests.cluster.slurm import COMMANDS, PACKAGES, two_nodes, until
from tests.cluster.tools import require
from tests.launch.jobs import differing, figures, saved_steps, state

pytestmark = pytest.mark.cluster

STEPS = 24
RUN = [
    "run.name=r", "wandb.mode=disabled", "launch.device=cpu", "model.name=tests.launch.nets:Held",
    f"train.steps={STEPS}", "train.log_every=3", "train.eval_every=12", "checkpoint.every=5",
]  # fmt: skip
ENVIRONMENT = {"PET_NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def slurm():
    require(*COMMANDS, packages=PACKAGES, root=True)
    with two_nodes() as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory):
    """A job that nothing happened to."""
    root = tmp_path_factory.mktemp("undisturbed")
    job = slurm.train(root, *RUN, SYNCBN_TEST_HOLD=str(root / "none"), **ENVIRONMENT)
    assert job.end() == ("COMPLETED", 0), job.tell()
    return job


@pytest.fixture
def hold(tmp_path):
    """A file that holds up the job's steps, so many seconds each, while it is there."""
    file = tmp_path / "hold"
    file.write_text("1")
    return file


@pytest.fixture
def train(slurm, tmp_path, hold):
    """Submit the job: train(*options of sbatch)."""
    return lambda *options: slurm.train(
        tmp_path / "runs", *RUN, options=options, SYNCBN_TEST_HOLD=str(hold), **ENVIRONMENT
    )


def assert_same_run(job, undisturbed):
    assert differing(state(job.folder), state(undisturbed.folder)) == []
    assert figures(job.folder) == figures(undisturbed.folder)


@pytest.mark.ci
def test_sbatch_trains_over_both_nodes_and_leaves_one_whole_folder(undisturbed):
    facts, folder = undisturbed.facts, undisturbed.folder
    assert (facts["NodeList"], facts["NumNodes"], facts["Restarts"]) == ("n[0-1]", "2", "0")
    assert "2 × 4 images on cpu" in undisturbed.said
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "result.json", "report.html", "logs", "status.json",
        "metric_names.json",
        "pictures",
    }  # fmt: skip
    assert {path.name for path in (folder / "logs").iterdir()} == {"rank0.log", "rank1.log"}
    assert json.loads((folder / "result.json").read_text())["ranks"] == 2
    assert state(folder)["step"] == STEPS


def test_a_job_that_is_requeued_saves_and_goes_on_by_itself(train, hold, undisturbed):
    job = train()
    job.until_past(10)
    job.slurm.ask("scontrol", "requeue", job.number)
    job.until_queued_again()
    step = job.preempted_at()
    assert max(saved_steps(job.folder)) == step
    hold.unlink()
    job.start_now()
    assert job.end() == ("COMPLETED", 0), job.tell()
    assert f"going on from step {step}" in job.said
    assert_same_run(job, undisturbed)


def test_scancel_with_sigterm_saves_and_the_same_command_goes_on(train, hold, undisturbed):
    job = train()
    job.until_past(10)
    job.slurm.ask("scancel", "--signal=TERM", job.number)
    assert job.end() == ("FAILED", 75), job.said
    step = job.preempted_at()
    assert max(saved_steps(job.folder)) == step
    assert job.facts["Restarts"] == "0"

    hold.unlink()
    again = train("--ntasks-per-node=2")  # which are one agent's ranks, as ever

    assert again.end() == ("COMPLETED", 0), again.said
    assert f"going on from step {step}" in again.said
    assert_same_run(again, undisturbed)


def test_a_job_saves_before_its_time_limit_and_queues_again(train, hold, undisturbed):
    hold.write_text("4")  # Slurm looks at time limits every half minute
    job = train()
    job.until_past(5)
    hours, minutes, _ = map(int, job.facts["RunTime"].split(":"))
    job.slurm.ask("scontrol", "update", f"jobid={job.number}", f"TimeLimit={60 * hours + minutes + 3}")
    job.until_queued_again()
    step = job.preempted_at()
    assert step < STEPS
    assert f"job {job.number} queues again" in job.said
    hold.unlink()
    job.start_now(TimeLimit=60)
    assert job.end() == ("COMPLETED", 0), job.tell()
    assert f"going on from step {step}" in job.said
    assert_same_run(job, undisturbed)


REFUSED = {
    "partition": (["--partition=nowhere"], "invalid partition specified: nowhere"),
    "nodes": (["--nodes=3"], "Requested node configuration is not available"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_the_cluster_does_not_have_is_refused_at_once(slurm, options, said):
    done = slurm.run("sbatch", "--test-only", *options, "launch/slurm.sbatch")
    assert done.returncode != 0
    assert said in done.stderr


def test_a_time_limit_beyond_the_partitions_waits_and_squeue_says_so(slurm, tmp_path):
    job = slurm.train(tmp_path / "runs", options=["--time=30-00:00:00"])
    until(lambda: job.facts["Reason"] == "PartitionTimeLimit", lambda: str(job.facts))
    slurm.ask("scancel", job.number)


def test_sbatch_takes_the_script_as_it_is(slurm):
    done = slurm.run("sbatch", "--test-only", "launch/slurm.sbatch", "norm=local")
    assert done.returncode == 0, done.stderr
    assert re.search(r"to start at .* on nodes n\[0-1\]", done.stderr)


def test_a_job_submitted_from_elsewhere_says_from_where_to_submit_it(slurm, tmp_path):
    script = os.path.abspath("launch/slurm.sbatch")
    done = slurm.run("sbatch", "--wait", "--parsable", "--output=log", script, cwd=tmp_path)
    assert done.returncode == 2
    assert (tmp_path / "log").read_text() == (
        f"error: {tmp_path} has no launch/torchrun.sh: submit the job from the folder of train.py, on a file system "
        "that all nodes see\n"
    )
