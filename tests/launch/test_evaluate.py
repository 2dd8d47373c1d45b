"""task=evaluate by both doors, on a real run: what it prints, what it leaves alone, how it is refused."""

import re

import pytest

from tests.launch.doors import TORCHRUN, errors, run
from tests.launch.jobs import PYTHON

EVALUATE = "task=evaluate"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run whose average is evaluated."""
    root = tmp_path_factory.mktemp("runs")
    options = ["train.steps=3", "train.ema=0.5", "launch.nproc=2", "wandb.mode=disabled", "run.name=r"]
    return run(PYTHON, *options, root=root), root / "r"


def figures(done):
    """The rows of a closing table that tell a figure."""
    assert done.returncode == 0, done.stderr
    return re.findall(r"^(eval/\w+) +(\S+)$", done.stdout, re.M)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_both_doors_print_what_the_run_came_to_and_leave_everything_as_it_was(trained):
    own, folder = trained
    before = contents(folder.parent)

    alone = run(PYTHON, EVALUATE, f"checkpoint={folder}")
    by_torchrun = run(TORCHRUN, EVALUATE, f"checkpoint={folder}/checkpoints/best", "data=fake", "data=digits")

    assert len(figures(own)) == 4
    assert figures(alone) == figures(own)
    assert figures(by_torchrun) == figures(own)
    for done in alone, by_torchrun:
        assert re.search(rf"^checkpoint +{folder}/checkpoints/step_000000003.pt$", done.stdout, re.M)
        assert re.search(r"^model +resnet8, norm=sync, the average$", done.stdout, re.M)
        assert "WARNING" not in done.stderr
    assert contents(folder.parent) == before


@pytest.mark.slow
def test_other_data_is_told_once_on_any_number_of_ranks(trained):
    _, folder = trained
    done = run(PYTHON, EVALUATE, f"checkpoint={folder}", "data=fake", "data.fake_samples=5", "launch.nproc=3")
    assert dict(figures(done))["eval/images"] == "1"
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"WARNING: the data is not that of {folder}/checkpoints/step_000000003.pt (train 1437 -> 5, "
    )


REFUSED = {
    "by-the-launcher": (TORCHRUN, [], "task=evaluate evaluates a checkpoint: give checkpoint=FILE"),
    "by-the-ranks": (PYTHON, ["checkpoint={folder}", "data=fake", "data.fake_classes=7"], "and the data has 7"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("door", "words", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_one_line(trained, door, words, said):
    _, folder = trained
    done = run(door, EVALUATE, *(word.format(folder=folder) for word in words))
    assert done.returncode == (2 if door is PYTHON else 1)  # torchrun has exit codes of its own
    (line,) = errors(done)
    assert said in line


@pytest.mark.slow
def test_a_sweep_evaluates_each_checkpoint(trained):
    own, folder = trained
    paths = ",".join(str(folder / "checkpoints" / name) for name in ("latest", "best"))
    done = run(PYTHON, "-m", EVALUATE, f"checkpoint={paths}")
    assert figures(done) == 2 * figures(own)
