"""What the runs of a folder are doing now: a live table, or figures for Prometheus.

`python -m syncbn.trainer.status runs/`
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from syncbn.trainer.errors import USER_ERROR, UserError, one_line
from syncbn.trainer.files import put_file
from syncbn.trainer.runs import lock, status_file
from syncbn.trainer.runs.status_file import LIVE, Status, when

# All that a run can be, and its colour
STATES = {
    "training": "green",
    "evaluating": "green",
    "starting": "green",
    "died": "red",  # it says that it goes on, and nobody holds its lock
    "failed": "red",
    "unreadable": "red",
    "preempted": "yellow",
    "unknown": "yellow",  # a run's folder without a word on its state
    "finished": "dim",
}
REFRESH_S = 1.0


@dataclass(frozen=True)
class Seen:
    """A run as it looks from outside. status: its own word; none if there is no whole one. note: what is wrong."""

    root: Path
    name: str
    state: str
    status: Status | None = None
    note: str = ""


def runs(roots: Sequence[Path]) -> list[Seen]:
    """Every run in the folders, or that is one of them, what goes on first. Raises UserError for what is no folder."""
    listed: list[Seen] = []
    for root in dict.fromkeys(root.resolve() for root in roots):
        if not root.is_dir():
            raise UserError(f"{root} is no folder: give the folder of runs, such as runs/")
        alone = look_at_run(root)
        listed += (
            [alone] if alone else [seen for entry in root.iterdir() if entry.is_dir() and (seen := look_at_run(entry))]
        )
    return sorted(listed, key=lambda seen: (_place(seen.state), seen.name, str(seen.root)))


def _place(state: str) -> int:
    """What goes on comes first, in one order whatever it does at the moment, and what is done last."""
    return 0 if state in LIVE else [*STATES].index(state)


def look_at_run(folder: Path) -> Seen | None:
    """The run in a folder; None if it holds none."""
    status: Status | None = None
    while True:
        before = status
        try:
            status = status_file.read_status(folder / status_file.NAME)
        except FileNotFoundError:
            status = None
        except (OSError, ValueError) as error:
            return Seen(folder.parent, folder.name, "unreadable", note=f"{status_file.NAME}: {one_line(str(error))}")
        holder = lock.holder(folder)
        state = _state(folder, status, holder)
        # The lock may have been given back in good order since the status was read
        if state != "died" or (status and before and status.updated == before.updated):
            break
    return Seen(folder.parent, folder.name, state, status, (status and status.error) or "") if state else None


def _state(folder: Path, status: Status | None, holder: lock.Holder | None) -> str | None:
    if holder and (status is None or (holder.pid and (holder.host, holder.pid) != (status.host, status.pid))):
        return "starting"  # what is told, if anything, is of the process before
    if status and (status.state not in LIVE or holder):
        return status.state
    if not (folder / "config.yaml").is_file():
        return None
    return "finished" if (folder / "result.json").is_file() else "died" if status else "unknown"


def rows(seen: Sequence[Seen], now: datetime | None = None) -> list[list[str]]:
    """The table, its head first."""
    table = [
        ["run", "state", "step", "epoch", "images/s", "objective", "checkpoint", "restarts", "ranks", "host", "told"]
    ]
    for run in seen:
        cells = [one_line(run.name), run.state, *_cells(run.status, now or datetime.now(UTC))]
        table.append(cells)
    return table


def _cells(status: Status | None, now: datetime) -> list[str]:
    if status is None:
        return ["–"] * 9
    return [
        f"{status.step}/{status.steps}",
        f"{status.epoch:.1f}",
        "–" if status.images_per_s is None else f"{status.images_per_s:,.0f}",
        "–" if status.objective is None else f"{status.objective:.4g}",
        "–" if status.checkpoint_step is None else str(status.checkpoint_step),
        str(status.restarts),
        str(status.world_size),
        one_line(status.host),
        _ago((now - when(status.updated)).total_seconds()),
    ]


def _ago(seconds: float) -> str:
    seconds = max(0.0, seconds)
    for unit, length in ("d", 86400), ("h", 3600), ("min", 60):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def plain(seen: Sequence[Seen]) -> str:
    """The table as lines, nothing cut, and what is wrong with which run."""
    table = rows(seen)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = 2  # columns of words; the others are numbers
    lines = [
        "  ".join(f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        for cells in table
    ]
    return "\n".join(line.rstrip() for line in [*lines, *_notes(seen), _summary(seen)])


def drawn(seen: Sequence[Seen]) -> Table:
    """The table for a terminal."""
    head, *body = rows(seen)
    table = Table(caption=Text("\n".join([*_notes(seen), _summary(seen)]), justify="left"), box=None, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < 2 else "right", overflow="fold", no_wrap=i > 1)
    for run, (name, state, *cells) in zip(seen, body, strict=True):
        table.add_row(Text(name), Text(state, STATES[run.state]), *map(Text, cells))
    return table


def _notes(seen: Sequence[Seen]) -> list[str]:
    return [f"{one_line(run.name)}: {run.note}" for run in seen if run.note]


def _summary(seen: Sequence[Seen]) -> str:
    states = [run.state for run in seen]
    return ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states) or "no runs"


# The name of a metric of Prometheus, what it is, and where it comes from
METRICS: dict[str, tuple[str, Any]] = {
    "step": ("Optimiser steps done.", lambda s: s.step),
    "steps": ("Optimiser steps of the whole training.", lambda s: s.steps),
    "epoch": ("Passes over the training images.", lambda s: s.epoch),
    "images_per_second": ("Training images of all ranks in a second, at the last log.", lambda s: s.images_per_s),
    "objective": ("What the last evaluation came to.", lambda s: s.objective),
    "checkpoint_step": ("Step of the checkpoint that the run would go on from.", lambda s: s.checkpoint_step),
    "restarts": ("How often the ranks were started again.", lambda s: s.restarts),
    "ranks": ("Ranks of the run.", lambda s: s.world_size),
    "started_timestamp_seconds": ("When these ranks were started.", lambda s: when(s.started).timestamp()),
    "updated_timestamp_seconds": ("When the run last told of itself.", lambda s: when(s.updated).timestamp()),
}


def exposition(seen: Sequence[Seen]) -> str:
    """The runs' figures in Prometheus' text format 0.0.4; what a run has not told yet is left out.

    Source: https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    labels = [f'root="{_escaped(str(run.root))}",run="{_escaped(run.name)}"' for run in seen]
    lines = [
        "# HELP syncbn_run_state 1 for the state that the run is in, 0 for the others.",
        "# TYPE syncbn_run_state gauge",
    ]
    for run, label in zip(seen, labels, strict=True):
        lines += [f'syncbn_run_state{{{label},state="{state}"}} {int(run.state == state)}' for state in STATES]
    for name, (help_text, value_of) in METRICS.items():
        lines += [f"# HELP syncbn_run_{name} {help_text}", f"# TYPE syncbn_run_{name} gauge"]
        for run, label in zip(seen, labels, strict=True):
            value = run.status and value_of(run.status)
            if value is not None:
                lines.append(f"syncbn_run_{name}{{{label}}} {_number(value)}")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return str(value) if math.isfinite(value) else "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def _escaped(label: str) -> str:
    label = label.encode(errors="backslashreplace").decode()  # a file's name need not be text
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def show_table(roots: Sequence[Path], console: Console, once: bool) -> None:
    """Print the table once, or keep it up to date until it is interrupted."""
    if once or not console.is_terminal:
        print(plain(runs(roots)))
        return
    with Live(console=console, auto_refresh=False) as live:
        for _ in _ticks(REFRESH_S):
            live.update(drawn(runs(roots)), refresh=True)


def write_figures(roots: Sequence[Path], file: Path, every_s: float | None) -> None:
    """Write the figures once, or again and again until it is interrupted."""
    for _ in _ticks(every_s) if every_s else [0]:
        text = exposition(runs(roots)).encode()
        if str(file) == "-":
            sys.stdout.buffer.write(text)
        else:
            with put_file(file, on_disk=False) as whole:
                whole.write(text)


def _ticks(every_s: float) -> Iterator[None]:
    while True:
        yield
        time.sleep(every_s)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m syncbn.trainer.status", description="Show what runs are doing.")
    parser.add_argument("roots", nargs="*", type=Path, default=[Path("runs")], help="folders of runs (default: runs)")
    parser.add_argument("--once", action="store_true", help="print the table once, as is done where no terminal is")
    parser.add_argument(
        "--prometheus", type=Path, metavar="FILE", help="write the figures for Prometheus; - prints them"
    )
    parser.add_argument("--every", type=float, metavar="S", help="write FILE again each S seconds")
    given = parser.parse_args(arguments)
    if given.every is not None and not (given.prometheus and given.every > 0):
        parser.error("--every takes a number of seconds above 0, with --prometheus FILE")
    with suppress(KeyboardInterrupt):
        try:
            if given.prometheus:
                write_figures(given.roots, given.prometheus, given.every)
            else:
                show_table(given.roots, Console(), given.once)
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
