"""What rank 0 shows, on a terminal and without one."""

import io

from rich.console import Console

from syncbn.trainer.console import Screen

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
    screen = Screen(40, console)
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


def test_the_closing_table_never_cuts_a_path():
    assert shown(terminal=False).splitlines()[-1] == "look           wandb leet " + 40 * "long/"


def test_a_terminal_gets_a_bar_with_the_latest_figures():
    text = shown(terminal=True)
    assert "30/40" in text
    assert "loss 2.0000  accuracy 25.00%  100 images/s  data wait  0%" in text
