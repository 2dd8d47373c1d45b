"""What rank 0 shows, on a terminal and without one."""

import io
import re

import pytest
from rich.console import Console

from syncbn import Verdict
from syncbn.trainer.display.screen import Screen
from syncbn.trainer.runs.metric import CLASSIFICATION

WINDOW = {
    "epoch": 0.5,
    "train/loss": 2.0,
    "train/accuracy": 0.25,
    "train/images_per_s": 100.0,
    "train/data_wait_share": 0.0,
}
LATER = {
    "epoch": 1.0,
    "train/loss": 1.0,
    "train/accuracy": 1.0,
    "train/images_per_s": 50.0,
    "train/data_wait_share": 0.4,
}
EVALUATED = {"epoch": 1.0, "eval/loss": 0.5, "eval/accuracy": 0.75}


def shown(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False, soft_wrap=True)
    screen = Screen(40, console, CLASSIFICATION)
    screen.start()
    for step, figures in ((30, WINDOW), (40, LATER), (40, EVALUATED)):
        screen.log(step, figures)
        screen.stepped(step)
        if screen.bar:
            screen.bar.refresh()
    screen.close({"eval/accuracy": "75 %", "look": "wandb leet " + 40 * "long/"})
    return console.file.getvalue()


def test_without_a_terminal_an_epoch_is_one_plain_line():
    # 30 steps at 100 images/s and 10 at 50 are 40 at 80; loss and accuracy are means over all steps
    line = "epoch   1.0  step     40  loss 1.7500  accuracy 43.75%  80 images/s  data wait 10%"
    assert shown(terminal=False).splitlines()[0] == line + "  |  eval loss 0.5000  accuracy 75.00%"


def test_a_window_without_a_good_step_has_no_part_in_the_loss():
    console = Console(file=io.StringIO(), width=200, highlight=False, soft_wrap=True)
    screen = Screen(40, console, CLASSIFICATION)
    bad = {name: value for name, value in LATER.items() if name not in ("train/loss", "train/accuracy")}
    for step, figures in ((20, WINDOW), (40, bad), (40, EVALUATED)):
        screen.log(step, figures)
    (line,) = console.file.getvalue().splitlines()
    assert "loss 2.0000  accuracy 25.00%  " in line
    screen.log(50, bad)
    screen.log(50, EVALUATED)
    assert "no good step  50 images/s  data wait 40%  |  eval loss" in console.file.getvalue()


def test_what_is_said_is_never_read_as_markup_or_as_the_name_of_a_picture():
    console = Console(file=io.StringIO(), width=200)
    Screen(1, console).say("[red]runs/:cat:[/red]")
    assert console.file.getvalue() == "[red]runs/:cat:[/red]\n"


def test_the_closing_table_never_cuts_a_path():
    assert shown(terminal=False).splitlines()[-1] == "look           wandb leet " + 40 * "long/"


def test_a_terminal_gets_a_bar_with_the_latest_figures():
    text = shown(terminal=True)
    assert "30/40" in text
    assert "loss 2.0000  accuracy 25.00%  100 images/s  data wait  0%" in text


SHARDS = Verdict("shards differ", "shards differ (ICC 0.21 at bn2, rank 3)", "bn2", 3)
SMALL = Verdict("batch too small", "batch too small (n_eff 6 at bn1): more", "bn1")


@pytest.mark.parametrize("terminal", [True, False])
def test_drift_is_told_when_it_begins_and_ends_and_stands_beside_the_bar(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False, soft_wrap=True)
    screen = Screen(40, console, CLASSIFICATION)
    screen.start()
    beside = []
    for step, verdicts in (
        (10, []),
        (20, [SMALL]),
        (30, [SHARDS, SMALL]),
        (40, [SMALL._replace(text="again")]),
        (50, []),
    ):
        screen.drift(step, verdicts)
        if screen.bar:
            beside.append(screen.bar.tasks[0].fields["drift"])
    screen.stop()
    assert re.findall(r"drift at step [^\x1b\n]*", console.file.getvalue()) == [
        f"drift at step 20: {SMALL.text}",
        f"drift at step 30: {SHARDS.text}",
        "drift at step 40: no longer shards differ",
        "drift at step 50: no longer batch too small",
    ]
    if terminal:
        assert beside == [
            "",
            "drift: batch too small",
            "drift: shards differ, batch too small",
            "drift: batch too small",
            "",
        ]


def test_a_table_lines_up_and_leaves_out_what_is_not_known():
    console = Console(file=io.StringIO(), width=200, highlight=False, soft_wrap=True)
    Screen(1, console).table({"bn1": {"icc": 0.123456, "n_eff": 12.0}, "layer4.bn2": {"n_eff": 7.0}}, "worst layers")
    assert console.file.getvalue().splitlines() == [
        "",
        "worst layers     icc  n_eff",
        "  bn1         0.1235     12",
        "  layer4.bn2              7",
    ]
