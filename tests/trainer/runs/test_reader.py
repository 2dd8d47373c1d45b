"""What is read from the folders of runs."""

import json

from syncbn.trainer.runs.reader import differing, read_run, read_runs
from tests.trainer.made_runs import make_run, rewrite


def test_a_run_that_died_has_the_verdicts_of_its_lines(tmp_path):
    folder = make_run(tmp_path / "a", logs=4, finished=False)
    verdicts = [
        ["gone (KL 1.0 at a.0.bn)"],
        ["shards differ (ICC 0.21 at layer4.1.bn2, rank 3)", "dead (4 at bn1)"],
        ["shards differ (ICC 0.3 at layer4.1.bn2, rank 3)"],
        ["shards differ (ICC 0.2 at layer4.2.bn2, rank 3)", "shards differ (ICC 0.25 at layer4.1.bn2, rank 3)"],
    ]
    lines = [json.dumps({"step": 10 * i, "drift/verdicts": texts}) for i, texts in enumerate(verdicts, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    assert [(v.text, v.first_step, v.last_step) for v in read_run(folder).verdicts] == [
        ("shards differ (ICC 0.2 at layer4.2.bn2, rank 3)", 40, 40),
        ("shards differ (ICC 0.25 at layer4.1.bn2, rank 3)", 20, 40),
        ("dead (4 at bn1)", 20, 20),
        ("gone (KL 1.0 at a.0.bn)", 10, 10),
    ]


def test_lines_that_cannot_be_read_are_skipped_and_said(tmp_path):
    folder = make_run(tmp_path / "a", finished=False)
    whole = len(read_run(folder).lines)
    rewrite(folder / "metrics.jsonl", lambda text: text[:-40])
    assert len(read_run(folder).lines) == whole - 1
    assert read_run(folder).notes == [f"metrics.jsonl: line {whole} cannot be read and was skipped"]
    rewrite(folder / "metrics.jsonl", lambda text: "[1]\n" + text)
    assert read_run(folder).notes == [
        "metrics.jsonl: 2 lines, the first of them line 1, cannot be read and were skipped"
    ]


def test_what_was_written_again_after_a_restart_counts_once(tmp_path):
    folder = make_run(tmp_path / "a", logs=3, layers=1, finished=False)
    again = '{"step": 20, "train/loss": 7.0, "drift/bn1/icc": 0.5}\n'
    rewrite(folder / "metrics.jsonl", lambda text: text + again)
    run = read_run(folder)
    assert list(run.points["train/loss"]) == [10, 20, 30]
    assert run.points["train/loss"][20] == 7.0
    assert run.grid("icc").columns == [10, 20, 30]
    assert run.grid("icc").values[0][1] == 0.5


def test_names_of_layers_hold_dots(tmp_path):
    run = read_run(make_run(tmp_path / "a", layers=3))
    assert run.grid("icc").rows == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]
    assert run.rank_z[0] == 600
    assert run.rank_z[1].rows == run.grid("icc").rows


def test_only_what_differs_between_configs_is_shown(tmp_path):
    folders = [
        make_run(tmp_path / "a", seed=1, config={"data.mean": [0.25], "model.weights": "x.pt"}),
        make_run(tmp_path / "b", config={"launch.nproc": 4, "train.new": True}),
    ]
    runs = read_runs(folders)
    rows = differing(runs)
    assert rows == {
        "seed": [1, 0],
        "data.mean": [[0.25], runs[1].config["data.mean"]],
        "model.weights": ["x.pt", None],
        "launch.nproc": [runs[0].config["launch.nproc"], 4],
        "train.new": [..., True],
    }


def test_runs_of_one_name_are_told_apart_by_their_roots(tmp_path):
    folders = [make_run(tmp_path / root / "same") for root in ("x", "y")]
    assert [run.label for run in read_runs([*folders, tmp_path / "y" / ".." / "x" / "same"])] == ["x/same", "y/same"]
