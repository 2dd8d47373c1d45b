"""The same command goes on where a job was left, bit for bit: real jobs, really killed."""

import json
import os
import re
import signal
import time

import pytest

from syncbn.trainer.files import SCRATCH
from tests.launch.jobs import PYTHON, ROOT, STANDALONE, differing, figures, finished, job, saved_steps, state
from tests.trainer.display.wandb_files import read
from tests.trainer.images import image_folder

STEPS = 60
EVERYTHING = [
    "run.name=r", "launch.nproc=2", f"train.steps={STEPS}", "train.log_every=3", "train.eval_every=16",
    "checkpoint.every=5", "data.workers=1", "data.augment.mixup=0.2", "train.accumulate=2", "train.ema=0.9",
    "wandb.mode=disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    code, said = finished(PYTHON, *EVERYTHING, root=root)
    assert code == 0, said
    return root / "r"


def assert_same_run(folder, undisturbed):
    assert differing(state(folder), state(undisturbed)) == []
    assert figures(folder) == figures(undisturbed)
    results = [json.loads((run / "result.json").read_text()) for run in (folder, undisturbed)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert "unfinished" not in (folder / "report.html").read_text()
    assert not list(folder.rglob("*.tmp"))


def assert_goes_on(root, undisturbed):
    """The same command goes on in the middle, and comes to what the undisturbed run came to."""
    step = max(saved_steps(root / "r"))
    assert 10 <= step < STEPS

    code, said = finished(PYTHON, *EVERYTHING, root=root)

    assert code == 0, said
    assert f"going on from step {step}" in said
    assert_same_run(root / "r", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["rank", "launcher"])
def test_killed_in_mid_epoch_and_gone_on_with_is_the_run_undisturbed(undisturbed, tmp_path, whom):
    root = tmp_path / "runs"
    with job(PYTHON, *EVERYTHING, root=root) as killed:
        killed.until_saved(10)
        os.kill(killed.ranks[1] if whom == "rank" else killed.process.pid, signal.SIGKILL)
        assert killed.wait() != 0
        assert killed.left_over() == {}
    assert_goes_on(root, undisturbed)


def assert_ends_when_asked(root, name):
    """It saves soon and says so, and leaves nothing behind."""
    with job(PYTHON, *EVERYTHING, root=root) as asked:
        asked.until_saved(10)
        began = time.monotonic()
        os.kill(asked.process.pid, getattr(signal, name))
        assert asked.wait() == 75
        assert time.monotonic() - began < 25  # 10 s are wanted of a machine that has nothing else to do
        assert asked.left_over() == {}
        (line,) = (line for line in asked.said.splitlines() if line.startswith("preempted"))
    assert max(saved_steps(root / "r")) == int(line.split()[3].rstrip(":"))


@pytest.mark.ci
@pytest.mark.slow
def test_a_job_that_is_asked_to_end_saves_and_goes_on(undisturbed, tmp_path):
    assert_ends_when_asked(tmp_path / "runs", "SIGTERM")
    assert_goes_on(tmp_path / "runs", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1", "SIGUSR2"])
def test_other_signals_ask_for_the_same(tmp_path, name):
    assert_ends_when_asked(tmp_path / "runs", name)


@pytest.mark.slow
def test_an_evaluation_is_left_at_once_and_made_after(tmp_path):
    slow = ["run.name=r", "model.name=tests.launch.nets:SlowEval", "data.eval_batch_per_rank=2", "train.steps=4"]
    slow += ["train.eval_every=2", "wandb.mode=disabled", "launch.nproc=2"]
    with job(PYTHON, *slow, root=tmp_path) as asked:  # 90 s an evaluation
        asked.until(lambda: (tmp_path / "r" / "metrics.jsonl").exists() and figures(tmp_path / "r"))
        time.sleep(2)
        os.kill(asked.process.pid, signal.SIGTERM)
        assert asked.wait(60) == 75
    saved = state(tmp_path / "r")
    assert (saved["step"], saved["evaluated"]) == (2, 0)

    with job(PYTHON, *slow, root=tmp_path) as again:
        again.until(lambda: "going on from step 2" in again.said)
        time.sleep(4)
        assert len(figures(tmp_path / "r")) == 1  # it evaluates, and does not train on before


@pytest.mark.slow
def test_what_is_printed_uploads_the_whole_run_after_it_was_asked_to_end(tmp_path):
    """Seen with W&B offline: two folders, and the line that is printed named the second half alone."""
    command = [*PYTHON, *EVERYTHING[:-1], "wandb.mode=offline"]
    for _ in range(2):
        with job(command, root=tmp_path / "runs") as asked:
            asked.until_past(max(saved_steps(asked.root / "r"), default=0) + 5)
            os.kill(asked.process.pid, signal.SIGTERM)
            assert asked.wait() == 75, asked.said
    code, said = finished(command, root=tmp_path / "runs")
    assert code == 0, said

    (upload,) = re.findall(r"^upload +wandb sync (.*)", said, re.M)
    history = [r["history"]["item"] for r in read(ROOT / upload) if r["type"] == "history"]
    record = [json.loads(line) for line in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    for name in "train/loss", "train/images_per_s", "eval/accuracy":
        logged, written = (
            [(line["step"], line[name]) for line in lines if name in line] for lines in (history, record)
        )
        assert logged == written
    assert len(list(tmp_path.glob("runs/r/wandb/offline-run-*/*.synced"))) == 2


@pytest.mark.slow
def test_torchrun_starts_all_ranks_again_by_itself(undisturbed, tmp_path):
    restarting = [*STANDALONE[:-1], "--nproc-per-node=2", "--max-restarts=1", "train.py"]
    with job(restarting, *EVERYTHING, root=tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") as killed:
        killed.until_saved(10)
        os.kill(killed.ranks[0], signal.SIGKILL)
        assert killed.wait() == 0, killed.said
        assert "going on from step" in killed.said
    assert_same_run(tmp_path / "r", undisturbed)


@pytest.mark.ci
@pytest.mark.slow
def test_a_finished_run_is_not_trained_again_unless_asked(undisturbed, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    (left := tmp_path / f"{SCRATCH}of-a-job-killed-at-its-very-end").mkdir()
    code, said = finished(PYTHON, *EVERYTHING, root=undisturbed.parent, TMPDIR=str(tmp_path))
    assert code == 0
    assert not left.exists()
    assert "is finished" in said
    assert "checkpoint.resume=none" in said
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before
    text = (undisturbed / "report.html").read_bytes()
    (undisturbed / "report.html").unlink()  # a job killed behind its result has written none
    code, said = finished(PYTHON, *EVERYTHING, root=undisturbed.parent, TMPDIR=str(tmp_path))
    assert (code, "is finished" in said) == (0, True)
    assert (undisturbed / "report.html").read_bytes() == text


@pytest.mark.slow
def test_another_runs_checkpoint_may_be_the_start_after_a_restart_too(undisturbed, tmp_path):
    longer = [word for word in EVERYTHING if not word.startswith(("train.steps", "train.eval_every", "checkpoint"))]
    last = STEPS + 26
    longer += [f"train.steps={last}", f"train.eval_every={last}", f"checkpoint.every={last}", "launch.max_restarts=1"]
    with job([*PYTHON, *longer, f"checkpoint={undisturbed}"], root=tmp_path / "runs") as killed:
        killed.until(lambda: f"going on from step {STEPS}" in killed.said)
        os.kill(killed.ranks[1], signal.SIGKILL)
        assert killed.wait() == 0, killed.said
        assert killed.said.count(f"going on from step {STEPS}") == 2
    assert [line["step"] for line in figures(tmp_path / "runs" / "r")] == [*range(STEPS + 3, last, 3), last, last]


@pytest.mark.ci
@pytest.mark.slow
def test_changed_data_is_not_gone_on_with(tmp_path):
    data = image_folder(tmp_path / "data", {"a": 8, "b": 8}, {"a": 2, "b": 1})
    command = [*PYTHON, "data=image_folder", f"data.root={data}", "run.name=r", "wandb.mode=disabled"]
    command += ["launch.nproc=1", "train.epochs=40", "checkpoint.every=1", "drift.level=off"]
    root = tmp_path / "runs"
    with job(command, root=root) as asked:
        asked.until_saved(2)
        os.kill(asked.process.pid, signal.SIGTERM)
        assert asked.wait() == 75
    (data / "train" / "a" / "0003.jpg").rename(data / "train" / "a" / "9999.jpg")

    code, said = finished(command, root=root)

    assert code == 2
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "the data has changed since" in line
    assert "checkpoint.resume=none" in line
