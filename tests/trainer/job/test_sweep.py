"""A sweep goes on past what fails, is continued by the same command, and ends in one table; its points take no time."""

import json
import math
import re
import signal
import sys

import pytest
import yaml

from syncbn.trainer.config import Config
from syncbn.trainer.display.wandb_run import Tracker, WandbConfig
from syncbn.trainer.errors import PREEMPTED, UserError
from syncbn.trainer.job import launch
from syncbn.trainer.report import comparison, page
from syncbn.trainer.report.sweep_plot import drawn_along
from syncbn.trainer.runs import sweep_folder
from syncbn.trainer.runs.metric import Metric
from tests.trainer.composed import composed
from tests.trainer.sweeps import ROOT, main


@pytest.fixture
def swept(tmp_path, monkeypatch, capfd):
    """A function: the exit code of a sweep, and what it said."""

    def run(*words, multirun="-m"):
        root = [] if any(word.startswith("run.root=") for word in words) else [f"run.root={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["train.py", multirun, *words, *root])
        with pytest.raises(SystemExit) as end:
            launch.enter(main)
        said = capfd.readouterr()
        return end.value.code, said.err + said.out

    before = signal.getsignal(signal.SIGINT)
    yield run
    signal.signal(signal.SIGINT, before)


def folder_of(root):
    (folder,) = (path for path in root.iterdir() if path.name.startswith("sweep-"))
    return folder


def states(root):
    return {point.words: point.state for point in sweep_folder.read_sweep(folder_of(root)).points}


def trained(said):
    return re.findall(r"^trains \S+/digits-resnet8-(\S+)$", said, re.M)


def table(said):
    """The rows of the table that was shown."""
    return [line.split() for line in said.rpartition("\n\n")[0].rpartition("\n\n")[2].splitlines()]


def test_every_point_has_a_run_and_all_are_compared(swept, tmp_path):
    code, said = swept("norm=local,sync", "data.batch_per_rank=2,8", "seed=0,1")
    assert code == 0, said
    lines = said.splitlines()
    folder = folder_of(tmp_path)
    assert folder.name == "sweep-data.batch_per_rank_2,8-norm_local,sync-seed_0,1"
    assert lines[0] == f"8 points: norm × data.batch_per_rank × seed, in {folder}/"
    assert lines[1] == "point 1 of 8: norm=local data.batch_per_rank=2 seed=0"
    assert re.match(r"point 8 of 8: norm=sync data.batch_per_rank=8 seed=1  \(about \d+ s left\)$", lines[15])
    assert trained(said) == [f"{n}-b{b}-seed{s}" for n in ("local", "sync") for b in (2, 8) for s in (0, 1)]
    assert [" ".join(row) for row in table(said)] == [
        "norm data.batch_per_rank accuracy n",
        "local 2 80.50% ± 0.71% 2",
        "local 8 80.50% ± 0.71% 2",
        "sync 2 90.50% ± 0.71% 2 best",
        "sync 8 90.50% ± 0.71% 2 best",
    ]
    assert {path.name for path in folder.iterdir()} == {"sweep.json", "points", "report.html"}
    assert {path.name for path in tmp_path.iterdir() if path != folder} == {
        f"digits-resnet8-{name}" for name in trained(said)
    }
    sweep = json.loads((folder / "sweep.json").read_text())
    assert [(p["choices"]["seed"], p["state"], p["objective"]) for p in sweep["points"][:2]] == [
        ("0", "finished", 0.8),
        ("1", "finished", 0.81),
    ]


def test_what_fails_or_is_refused_says_why_and_the_others_are_done(swept, tmp_path):
    code, said = swept("norm=torch,sync", "seed=0,13,1")
    assert code == 2, said
    assert "point 1 of 6 refused: norm=torch on cpu: it needs GPUs\n" in said
    assert "point 5 of 6 failed: ZeroDivisionError: seed 13\n" in said
    assert trained(said) == ["sync-b4-seed0", "sync-b4-seed1"]
    assert [" ".join(row) for row in table(said)] == [
        "norm accuracy n",
        "torch – 0 of 3 3 refused",
        "sync 90.50% ± 0.71% 2 of 3 best, 1 failed",
    ]
    assert "\nfailed: ZeroDivisionError: seed 13 (norm=sync seed=13)\n" in said
    assert said.splitlines()[-1] == (
        "3 refused, 2 finished, 1 failed: the same command goes on with what is not finished (those that were refused "
        "need other words)"
    )
    assert "Traceback" not in said
    assert (folder_of(tmp_path) / "report.html").exists()


def test_the_same_command_goes_on_with_what_is_not_finished(swept, tmp_path):
    code, said = swept("seed=0,75,1")
    assert (code, trained(said)) == (PREEMPTED, ["sync-b4-seed0"]), said
    assert states(tmp_path) == {"seed=0": "finished", "seed=75": "preempted", "seed=1": "not run"}
    assert "point 3" not in said
    (tmp_path / "digits-resnet8-sync-b4-seed0" / "mark").touch()
    code, said = swept("seed=0,75,1", "launch.nproc=3", "wandb.mode=disabled", "hydra.verbose=false")
    assert (code, trained(said)) == (PREEMPTED, [])
    assert "seed0 is finished" in said
    assert (tmp_path / "digits-resnet8-sync-b4-seed0" / "mark").exists()
    assert sweep_folder.read_sweep(folder_of(tmp_path)).points[0].took_s is None  # there was nothing to train


@pytest.mark.slow
def test_an_interruption_before_the_ranks_are_there_ends_the_sweep_with_its_table(swept, tmp_path):
    code, said = swept("seed=0,2,1")
    assert code == PREEMPTED
    assert "Traceback" not in said
    assert states(tmp_path) == {"seed=0": "finished", "seed=2": "preempted", "seed=1": "not run"}
    assert said.splitlines()[-1].startswith("1 finished, 1 preempted, 1 not run: the same command goes on")


BAD = {
    "unknown-key": (["data.batchh=1,2"], "data.batchh: no such key; did you mean"),
    "unknown-choice": (["norm=syncc,local"], "norm=syncc: no such choice; choose one of batch_renorm, evonorm_s0, "),
    "last-point": (["seed=0,1", "norm=sync,locall"], "norm=locall: no such choice"),
    "wrong-type": (["seed=0,one"], "seed: Value 'one' of type 'str' could not be converted to Integer"),
    "nothing-swept": (["seed=0"], "-m runs a job for each of several values, and no key has any: give norm=local,sync"),
    "one-name": (["seed=0,1", "run.name=x"], "points 1 and 2 (seed=0; seed=1) would be one run, x: give each a name"),
    "not-in-the-name": (["launch.nproc=1,2"], "'run.name=NAME-${launch.nproc}'"),
    "twice": (["seed=0,0"], "points 1 and 2 are both seed=0: name each value once"),
    "interval": (["optim.lr=interval(0.1,1)"], "optim.lr=interval(0.1,1): a range has no end of values to try"),
    "two-roots": (["run.root=a,b"], "a sweep has one folder for all of its runs"),
    "unknown-key-drawn": (["hydra/sweeper=optuna", "optim.lrr=interval(0.1,1)"], "optim.lrr: no such key"),
}


@pytest.mark.plain("unknown-key", "nothing-swept", "one-name")
@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD)
def test_a_sweep_that_cannot_be_is_refused_in_one_line_before_the_first_point(swept, tmp_path, words, said):
    if "hydra/sweeper=optuna" in words:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    code, output = swept(*words)
    assert code == 2
    (line,) = output.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_points_may_have_names_that_tell_what_a_run_does_not(swept, tmp_path):
    code, said = swept("launch.nproc=1,2", "run.name=x-${launch.nproc}")
    assert code == 0, said
    assert {path.name for path in tmp_path.iterdir()} >= {"x-1", "x-2"}


@pytest.mark.slow
def test_a_point_whose_config_is_wrong_is_refused_and_the_others_are_done(swept):
    code, said = swept("norm.group=0,world")
    assert code == 2
    assert "point 1 of 2 refused: norm.group=0: give world, node, a number of ranks" in said
    assert len(trained(said)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["seed=0,1"], ["seed=0,1", "model.weights='a b$(c)?token=s3cret'"], ["seed=0,1", f"model.weights={'x' * 300}"]],
    ids=["plain", "signs", "long"],
)
def test_a_sweep_has_one_folder_whatever_its_words(swept, tmp_path, words):
    for _ in range(2):
        code, said = swept(*words)
        assert code == 0, said
        folder_of(tmp_path)  # there is one
    assert "s3cret" not in "".join(path.read_text() for path in folder_of(tmp_path).rglob("*") if path.is_file())


@pytest.mark.slow
def test_its_folder_is_taken_for_no_run_and_no_run_takes_it(swept, tmp_path):
    from syncbn.trainer import status

    swept("seed=0,1")
    name = folder_of(tmp_path).name
    assert name not in [seen.name for seen in status.runs([tmp_path])]
    code, said = swept(f"run.name='{name}'", multirun="seed=0")
    assert code == 2
    assert "is no run (it has no config.yaml)" in said


def test_the_report_is_made_again_from_the_folder(swept, tmp_path, capfd):
    swept("norm=sync,torch", "seed=0,1")
    written = folder_of(tmp_path) / "report.html"
    first = written.read_text()
    written.unlink()
    (folder_of(tmp_path) / "sweep.json").touch()
    assert page.main([str(folder_of(tmp_path))]) == 0
    assert written.read_text() == first
    runs = [str(path) for path in tmp_path.iterdir()]
    assert page.main(runs) == 2
    assert "is a sweep: give it alone, or give runs" in capfd.readouterr().err


@pytest.mark.slow
def test_points_side_by_side_in_processes_of_their_own_come_to_one_table(swept, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    code, said = swept("norm=torch,local,sync", "seed=0,13", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert code == 2, said
    assert sorted(trained(said)) == ["local-b4-seed0", "sync-b4-seed0"]
    assert list(states(tmp_path).values()) == ["refused", "refused", "finished", "failed", "finished", "failed"]


@pytest.mark.slow
def test_with_joblib_too_a_point_that_is_asked_to_end_ends_the_sweep(swept, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    code, said = swept("seed=75,0,1,3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    assert code == PREEMPTED, said
    assert trained(said) == []


@pytest.mark.slow
def test_each_point_may_be_a_job_of_submitit(swept, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    code, said = swept("norm=torch,sync", "hydra/launcher=submitit_local")
    assert code == 2, said
    assert states(tmp_path) == {"norm=torch": "refused", "norm=sync": "finished"}
    (line,) = (line for line in said.splitlines() if line.startswith("refused: "))
    (where,) = re.findall(r"what it said is in (\S+)\) ", line)
    assert where.startswith(str(folder_of(tmp_path)))


@pytest.mark.slow
def test_optuna_draws_points_and_draws_the_same_ones_again(swept, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=4",
        "optim.lr=tag(log,interval(0.01,0.5))",
        "norm=torch,sync",
    ]
    code, said = swept(*words)
    assert code == 2, said
    assert "4 points: optim.lr × norm, in " in said
    first = states(tmp_path)
    assert len(first) == 4
    assert sorted(first.values())[0] == "finished"
    code, said = swept(*words)
    assert states(tmp_path) == first
    assert trained(said) == []
    results = (folder_of(tmp_path) / "optimization_results.yaml").read_text()
    best = max(p.objective or 0 for p in sweep_folder.read_sweep(folder_of(tmp_path)).points)
    assert f"best_value: {best}" in results


@pytest.mark.slow
def test_a_sweeper_of_which_no_point_is_finished_ends_without_a_traceback(swept):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    code, said = swept("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "optim.lr=interval(0.1,1)", "norm=torch")
    assert code == 2
    assert "No trials" not in said


def made(*rows, swept=("norm", "seed"), total=None):
    """A sweep of points as they were recorded: choices, state and objective of each."""
    points = [
        sweep_folder.Point(dict(zip(swept, choices, strict=True)), state=state, objective=value)
        for choices, state, value in rows
    ]
    return sweep_folder.Sweep(list(swept), total or len(points), "accuracy", 0.0, points)


def test_a_setting_is_the_mean_and_spread_of_its_seeds_that_are_finished():
    sweep = made(
        (("sync", "0"), "finished", 0.8),
        (("sync", "1"), "finished", 0.9),
        (("sync", "2"), "failed", None),
        (("local", "0"), "finished", 0.7),
        (("local", "1"), "finished", None),
        (("none", "0"), "not run", None),
    )
    settings = comparison.settings(sweep)
    assert [(s.choices["norm"], s.best, s.note) for s in settings] == [
        ("sync", True, "1 failed"),
        ("local", False, "1 not finite"),
        ("none", False, "not run"),
    ]
    assert [comparison.spread(s, Metric("accuracy", "%")) for s in settings] == ["85.00% ± 7.07%", "70.00%", "–"]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (["1", "4"], ([1, 4], False)),
        (["1", "2", "4.1"], ([1, 2, 4.1], True)),
        (["0", "8"], ([0, 8], False)),
        (["-1", "8"], ([-1, 8], False)),
        (["2", "world"], None),
        (["true", "false"], None),
        (["nan", "1"], None),
    ],
    ids=str,
)
def test_numbers_far_apart_stand_on_a_logarithmic_axis_and_words_are_categories(values, scale):
    assert comparison.scale(values) == scale


def test_a_line_for_each_combination_of_the_other_keys():
    keys = ("norm", "data.batch_per_rank", "seed")
    rows = [((n, b, s), "finished", 0.5) for n in ("a", "b") for b in ("1", "8") for s in ("0", "1")]
    along = comparison.lines(made(*rows, swept=keys), "data.batch_per_rank")
    assert [(line.name, line.along, line.stds) for line in along] == [
        ("norm=a", ["1", "8"], [0.0, 0.0]),
        ("norm=b", ["1", "8"], [0.0, 0.0]),
    ]


@pytest.mark.slow
def test_a_record_that_was_cut_counts_as_a_point_that_was_not_run(swept, tmp_path):
    swept("seed=0,1")
    for record in (folder_of(tmp_path) / "points").iterdir():
        record.write_text(record.read_text()[:-20])
    assert len(sweep_folder.read_sweep(folder_of(tmp_path)).points) == 2
    (folder_of(tmp_path) / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        sweep_folder.read_sweep(folder_of(tmp_path))


def test_a_figure_along_a_key_has_error_bars_and_names_what_was_tried():
    lines = [{"name": "a", "along": ["8", "2"], "means": [0.9, 0.8], "stds": [0.01, math.nan]}]
    axes = drawn_along(lines, title="t", key="k", numbers=[8.0, 2.0], log=False, percent=True).axes[0]
    (bar,) = axes.containers
    assert list(bar.lines[0].get_xdata()) == [2.0, 8.0]
    assert list(bar.lines[0].get_ydata()) == [0.8, 0.9]
    assert [len(path.vertices) for path in bar.lines[2][0].get_paths()].count(2) >= 1
    assert [text.get_text() for text in axes.get_xticklabels()] == ["8", "2"]
    words = drawn_along([{**lines[0], "along": ["sync", "local"]}], title="t", key="norm").axes[0]
    assert [text.get_text() for text in words.get_xticklabels()] == ["sync", "local"]
    assert drawn_along(lines, title="t", key="k", numbers=[8.0, 2.0], log=True).axes[0].get_xscale() == "log"


def test_the_words_that_wandb_makes_of_its_sweep_are_a_config(monkeypatch):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "launch" / "wandb_sweep.yaml").read_text())
    for end in 0, -1:  # what a server may draw: the first and the last of each
        drawn = {
            key: {"value": each["values"][end] if "values" in each else each[("min", "max")[end]]}
            for key, each in sweep["parameters"].items()
        }
        made = {
            **create_sweep_command_args({"args": drawn}),
            "env": [],
            "interpreter": [],
            "program": [sweep["program"]],
        }
        command = [
            word for part in create_sweep_command(list(sweep["command"])) for word in made.get(part[2:-1], [part])
        ]
        assert command[0] == "train.py"
        config = composed(*command[1:])
        assert isinstance(config, Config), config
        assert (config.norm.name, config.wandb.mode) == (drawn["norm"]["value"], "online")
        assert config.optim.lr == drawn["optim.lr"]["value"]
    assert sweep["metric"] == {"name": "eval/accuracy", "goal": "maximize"}


def test_a_run_of_wandbs_sweep_has_the_id_that_its_agent_waits_for(tmp_path, monkeypatch):
    def run_id():
        return Tracker(WandbConfig(mode="disabled"), tmp_path, name="a", group="b", settings={}).run_id

    monkeypatch.setenv("WANDB_RUN_ID", "abcd1234")
    assert run_id() != "abcd1234"  # of a shell, and perhaps of another run
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert run_id() == "abcd1234"
