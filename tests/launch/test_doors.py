"""Both doors with real processes: what they leave behind, what they print, how they end."""

import json
import pickle
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from syncbn.trainer.errors import Ended, RanksFailed, UserError
from syncbn.trainer.job import launch
from syncbn.trainer.models.residual import SmallResNet
from syncbn.trainer.runs import status_file
from tests.launch.doors import TORCHRUN, errors, run
from tests.launch.jobs import PYTHON, ROOT
from tests.launch.jobs import state as latest
from tests.trainer.images import image_folder

BIN = Path(sys.executable).parent
SHORT = ["train.steps=6", "train.log_every=2"]
# A figure that is a time differs from run to run
TIMES = ("time_s", "train/images_per_s", "train/step_ms", "train/data_wait_share")


def figures(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def test_what_starts_the_ranks_does_not_wait_for_what_they_alone_import():
    code = "import sys, syncbn.trainer.job.launch; print([m for m in sys.argv[1:] if m in sys.modules])"
    seconds_each = ["torchvision", "torch._dynamo", "matplotlib"]
    done = subprocess.run([sys.executable, "-c", code, *seconds_each], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of the default job by the first door."""
    root = tmp_path_factory.mktemp("runs")
    return run(PYTHON, *SHORT, "launch.nproc=2", root=root), root / "digits-resnet8-sync-b4-train.steps_6-seed0"


def test_python_train_leaves_one_whole_folder(trained):
    done, folder = trained
    assert done.returncode == 0, done.stderr
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "wandb", "result.json", "report.html", "logs", "status.json",
        "metric_names.json", "pictures",
    }  # fmt: skip
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 6
    assert {p.name for p in (folder / "logs").iterdir()} == {"rank0.log", "rank1.log"}
    result = json.loads((folder / "result.json").read_text())
    assert result["objective"] == result["metrics"]["eval/accuracy"]
    assert result["metrics"].keys() >= {"eval/accuracy", "eval/loss"}
    assert result["metrics"]["eval/images"] == 360


def test_its_status_tells_what_became_of_it(trained):
    _, folder = trained
    record = status_file.read_status(folder / "status.json")
    result = json.loads((folder / "result.json").read_text())
    assert (record.state, record.step, record.steps, record.restarts, record.world_size) == ("finished", 6, 6, 0, 2)
    assert (record.checkpoint, record.checkpoint_step, record.error) == ("step_000000006.pt", 6, None)
    assert record.objective == result["objective"]
    assert record.images_per_s > 0
    assert status_file.when(record.started) < status_file.when(record.updated)


def test_metrics_are_written_down_with_their_units(trained):
    _, folder = trained
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 6]
    assert lines[0].keys() == {
        "step", "time_s", "epoch", "train/loss", "train/accuracy", "train/lr", "train/images_per_s", "train/step_ms",
        "train/data_wait_share", "train/skipped_images", "train/bad_steps",
    }  # fmt: skip
    assert lines[-1]["eval/images"] == 360
    # Drift is read every hundred steps, and before each eval
    assert lines[2]["drift/verdicts"] == []
    assert lines[2]["drift/blocks.2.bn2/n_eff"] > 1
    assert len(lines[-1]["drift/rank_z"]["blocks.2.bn2"]) == 2


def test_without_a_terminal_lines_are_plain_and_tell_where_all_lies(trained):
    done, folder = trained
    assert "\x1b" not in done.stdout
    assert "norm=sync: 7 of 7 batch norm layers converted" in done.stdout
    assert "eval/accuracy" in done.stdout
    for command in "wandb leet", "wandb sync":
        (path,) = (line.split(command)[1].strip() for line in done.stdout.splitlines() if command in line)
        assert Path(path).parent == folder / "wandb"
        assert Path(path).is_dir()


@pytest.mark.ci
@pytest.mark.slow
def test_commands_that_are_printed_can_be_pasted_whatever_the_run_is_called(tmp_path):
    name = """it's a "{b,c}" $HOME :cat: *"""
    word = "run.name='" + name.replace("'", "\\'") + "'"  # as Hydra reads it
    done = run(PYTHON, "train.steps=1", "launch.nproc=1", "drift.level=off", word, root=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / name / "wandb").glob("offline-run-*")
    for row, command in ("look", "wandb leet"), ("upload", "wandb sync"):
        (line,) = re.findall(rf"^{row} +(.*)", done.stdout, re.M)
        pasted = subprocess.run(["bash", "-c", f"printf '%s\n' {line}"], cwd=ROOT, capture_output=True, text=True)
        assert pasted.stdout.splitlines() == [*command.split(), str(folder)]


def test_the_checkpoint_is_whole_and_holds_no_code(trained):
    _, folder = trained
    state = latest(folder)
    assert state["step"] == 6
    assert {"model", "optimizer", "schedule"} <= state.keys()
    assert not any("module." in name for name in state["model"])
    assert not list((folder / "checkpoints").glob("*.tmp"))


def test_wandb_has_the_same_figures_offline(trained):
    _, folder = trained
    (run_file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    inspect = [BIN / "wandb", "leet", "inspect", "--json", run_file]
    shown = subprocess.run(inspect, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "eval/accuracy" in shown
    assert "train/images_per_s" in shown
    assert "digits-resnet8-sync-b4-train.steps_6-seed0" in shown


@pytest.fixture(scope="module")
def drifting(tmp_path_factory):
    """A run whose batches are too small for its norm."""
    root = tmp_path_factory.mktemp("drifting")
    options = ["norm=local", "data.batch_per_rank=2", "launch.nproc=2", "train.steps=40", "drift.every=1"]
    return run(PYTHON, *options, "run.name=small", root=root), root / "small"


SMALL = r"batch too small \(n_eff \d+ at [\w.]+\): use norm=sync or a larger group"


@pytest.mark.slow
def test_a_verdict_is_shown_when_it_comes_and_at_the_end(drifting):
    done, folder = drifting
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^drift at step 30: {SMALL}$", done.stdout, re.M)
    assert re.search(rf"^drift  +{SMALL}, steps 30 to 40$", done.stdout, re.M)
    assert re.search(r"^worst layers +icc +n_eff +dmean_z", done.stdout, re.M)
    (verdict,) = json.loads((folder / "result.json").read_text())["drift"]["verdicts"]
    assert (verdict["kind"], verdict["first_step"], verdict["last_step"]) == ("batch too small", 30, 40)
    assert re.search(SMALL, (folder / "report.html").read_text())


@pytest.mark.slow
def test_wandb_is_alerted_and_keeps_maps_and_tables_offline(drifting):
    _, folder = drifting
    (run_file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    inspect = [BIN / "wandb", "leet", "inspect", "--json", run_file]
    shown = subprocess.run(inspect, capture_output=True, text=True, timeout=60, check=True).stdout
    records = [json.loads(line) for line in shown.splitlines()]
    (alert,) = (record["alert"] for record in records if record["type"] == "alert")
    assert re.fullmatch(f"step 30: {SMALL}", alert["text"])
    summaries = [record["summary"]["update"] for record in records if record["type"] == "summary"]
    assert any(re.match(SMALL, update.get("verdict", "")) for update in summaries)
    history = {key for record in records if record["type"] == "history" for key in record["history"]["item"]}
    assert {
        f"drift/blocks.2.bn2/{name}" for name in ("f", "icc", "n_eff", "dmean_z", "dlogvar_z", "kl", "dead")
    } <= history
    media = {
        path.parent.parent.name + "/" + path.name.split("_60")[0] for path in run_file.parent.glob("files/media/*/*/*")
    }
    assert {name.split("_40_")[0] for name in media} == {
        "images/pictures",
        *(f"images/map_{name}" for name in ("icc", "n_eff", "rank_z")),
        *(f"table/by_{name}" for name in ("icc", "n_eff", "rank_z")),
    }


def test_torchrun_trains_the_same_run(trained, tmp_path):
    done = run(TORCHRUN, *SHORT, root=tmp_path)
    assert done.returncode == 0, done.stderr
    _, folder = trained
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    assert figures(tmp_path / folder.name) == figures(folder)


@pytest.mark.ci
@pytest.mark.slow
def test_a_typo_under_torchrun_ends_the_whole_job_at_once(tmp_path):
    began = time.monotonic()
    done = run(TORCHRUN, "data.batch=3", root=tmp_path)
    assert done.returncode != 0
    assert errors(done) == [
        "error: data.batch: no such key; did you mean data.batch_per_rank? (python train.py --help lists all)"
    ]
    assert time.monotonic() - began < 120  # a rank left waiting would wait for 300 s
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_multirun_under_torchrun_is_refused_with_the_right_command():
    done = run(TORCHRUN, "-m", "seed=0,1")
    assert done.returncode != 0
    (line,) = errors(done)
    assert line.endswith("run: python train.py -m seed=0,1 launch.nproc=2")


def test_the_command_in_place_of_a_multirun_under_torchrun_can_be_pasted(monkeypatch):
    words = ["seed=0,1", "run.root=a b", "data.mean=[0.5]", "+x={a:1}", "run.name=$HOME"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *words])
    with pytest.raises(UserError) as refused:
        launch._refuse_multirun()
    command = str(refused.value).partition("; run: ")[2]
    assert shlex.split(command) == ["python", "train.py", "-m", *words, "launch.nproc=1"]
    assert " seed=0,1 " in command  # as it was given


@pytest.mark.slow
def test_help_under_torchrun_leaves_nobody_waiting():
    done = run(TORCHRUN, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: python train.py") == 1


@pytest.mark.parametrize("kind", [RanksFailed, Ended])
def test_how_ranks_ended_survives_the_way_back_from_another_machine(kind):
    back = pickle.loads(pickle.dumps(kind("rank 1 failed with exit code 3", 3, "no room")))
    assert (type(back), str(back), back.exit_code, back.reason) == (
        kind,
        "rank 1 failed with exit code 3",
        3,
        "no room",
    )


def test_another_config_in_the_folder_is_refused_and_nothing_touched(trained):
    _, folder = trained
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    again = run(PYTHON, "train.steps=7", f"run.name={folder.name}", root=folder.parent)
    assert again.returncode == 2
    (line,) = errors(again)
    assert "train.steps 6 -> 7" in line
    assert "run.overwrite=true" in line
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


REFUSED = {
    "missing-data": (["data=image_folder", "data.root=/nowhere"], "data.root=/nowhere has no folder 'train'"),
    "no-gpu": (["launch.device=cuda", "launch.nproc=99"], "launch.device=cpu"),
}


@pytest.mark.plain("no-gpu")
@pytest.mark.parametrize(("arguments", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_nothing_behind(tmp_path, arguments, said):
    done = run(PYTHON, *arguments, root=tmp_path)
    assert done.returncode == 2
    (line,) = errors(done)
    assert said in line
    assert done.stderr.splitlines() == [line]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_diverging_run_stops_everywhere_and_keeps_the_last_good_state(tmp_path):
    wild = ["optim.lr=300", "schedule.warmup_epochs=0.3", "train.eval_every=2", "train.steps=90", "train.log_every=2"]
    done = run(PYTHON, *wild, "run.name=wild", "model.name=tests.launch.nets:explosive", root=tmp_path)
    assert done.returncode == 2
    (line,) = errors(done)
    first, last = map(
        int, re.search(r"not finite from step (\d+) to step (\d+): every rank has stopped", line).groups()
    )
    assert last - first + 1 > 10
    state = latest(tmp_path / "wild")
    assert state["step"] < first
    assert all(v.isfinite().all() for v in state["model"].values())
    assert not (tmp_path / "wild" / "result.json").exists()
    assert figures(tmp_path / "wild")[-1]["step"] < last


@pytest.mark.slow
def test_a_graph_break_ends_the_run_in_one_line(tmp_path):
    done = run(PYTHON, "train.compile=true", "model.name=tests.launch.nets:Branching", *SHORT, root=tmp_path)
    assert done.returncode == 2
    (line,) = errors(done)
    assert "nets.py" in line
    assert line.endswith("(Data-dependent branching): write that without a graph break, or train.compile=false")


@pytest.mark.slow
def test_an_unreadable_image_ends_the_run_by_name_or_is_skipped(tmp_path):
    data = image_folder(tmp_path / "data", {"a": 8, "b": 8}, {"a": 2, "b": 1})
    (data / "train" / "a" / "0003.jpg").write_bytes(b"not an image")
    command = [*PYTHON, "data=image_folder", f"data.root={data}", "train.epochs=2", "wandb.mode=disabled", "run.name=r"]

    done = run(command, root=tmp_path)
    assert done.returncode == 2
    (line,) = errors(done)
    assert "train/a/0003.jpg" in line

    done = run(command, "data.skip_broken=true", "run.overwrite=true", root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sum(line.get("train/skipped_images", 0) for line in figures(tmp_path / "r")) == 2
    assert json.loads((tmp_path / "r" / "result.json").read_text())["metrics"]["eval/images"] == 3


@pytest.mark.slow
def test_nothing_to_convert_is_a_warning_that_says_why(tmp_path):
    done = run(PYTHON, "model.name=tests.launch.nets:group_norm", "launch.nproc=1", "train.steps=1", root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING: norm=sync converted nothing: the model has GroupNorm ×1" in done.stderr


@pytest.mark.slow
def test_a_failure_of_wandb_is_reported_and_the_run_goes_on_offline(tmp_path):
    done = run(PYTHON, "wandb.mode=online", "launch.nproc=1", "run.name=online", *SHORT, root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"W&B failed \(.*No API key.*\); the run goes on offline", done.stderr)
    assert len(figures(tmp_path / "online")) == 4
    (offline,) = (tmp_path / "online" / "wandb").glob("offline-run-*")
    assert str(offline) in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        [
            "train.precision=bf16",
            "train.channels_last=true",
            "train.ema=0.9",
            "train.accumulate=2",
            "train.clip_norm=1",
        ],
        ["train.compile=true", "launch.nproc=1"],  # each rank takes a minute to compile
        [
            "optim=adamw",
            "data.augment.policy=rand",
            "data.augment.mixup=0.2",
            "data.workers=1",
            "task.label_smoothing=0.1",
        ],
    ],
    ids=["bf16-ema-accumulate", "compile", "adamw-mixup-workers"],
)
def test_every_switch_trains(tmp_path, options):
    done = run(PYTHON, *options, *SHORT, "run.name=r", "wandb.mode=disabled", root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r" / "result.json").read_text())["metrics"]["eval/loss"] > 0
    saved = latest(tmp_path / "r")["model"]
    assert list(saved) == list(SmallResNet(8, 10).state_dict())  # neither DDP nor torch.compile shows
