"""What rank 0 shows: a progress bar on a terminal, plain lines elsewhere, a table at the end."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from syncbn import Verdict
from syncbn.trainer.runs.metric import Metric

PLAIN_LINE_EVERY_S = 30.0


class Screen:
    """Shows a training of a known number of steps."""

    def __init__(self, steps: int, console: Console | None = None, metrics: Sequence[Metric] = ()):
        """metrics: what is shown of each training window and evaluation, in this order."""
        self.steps, self.metrics = steps, [metric for metric in metrics if not metric.detail]
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.windows: list[tuple[int, dict[str, float]]] = []  # training figures since the last evaluation
        self.read_at = 0
        self.said_at = time.monotonic()
        self.wrong: list[str] = []
        self.bar: Progress | None = None

    def say(self, text: str) -> None:
        # A full disk under a job's output, or a pipe that nobody reads, is no reason to end it
        with suppress(OSError):
            self.console.print(text, markup=False, emoji=False)

    def start(self) -> None:
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[yellow]{task.fields[drift]}"),
            console=self.console,
            transient=True,
        )
        self.task = self.bar.add_task("train", total=self.steps, figures="", drift="")
        self.bar.start()

    def stepped(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Show training figures on the bar, and an evaluation as a line of its own."""
        if "train/images_per_s" in figures:
            self.windows.append((step - self.read_at, figures))
            self.read_at = step
        if any(name.startswith("eval/") for name in figures):
            # None where another process trained, and this one goes on with the evaluation
            trained = f"{self._trained(self._mean())}  |  " if self.windows else ""
            self.say(f"epoch {figures['epoch']:5.1f}  step {step:>6}  {trained}eval {self._learnt(figures, 'eval')}")
            self.windows, self.said_at = [], time.monotonic()
            return
        now = self._trained(figures)
        if self.bar:
            self.bar.update(self.task, figures=now)
        elif time.monotonic() - self.said_at > PLAIN_LINE_EVERY_S:
            self.say(f"epoch {figures['epoch']:5.1f}  step {step:>6}  {now}")
            self.said_at = time.monotonic()

    def drift(self, step: int, verdicts: Sequence[Verdict]) -> None:
        """Show what is wrong with the ranks' statistics: beside the bar, and as a line when it begins and ends."""
        kinds = [verdict.kind for verdict in verdicts]
        for verdict in verdicts:
            if verdict.kind not in self.wrong:
                self.say(f"drift at step {step}: {verdict.text}")
        for kind in self.wrong:
            if kind not in kinds:
                self.say(f"drift at step {step}: no longer {kind}")
        self.wrong = kinds
        if self.bar:
            self.bar.update(self.task, drift=f"drift: {', '.join(kinds)}" if kinds else "")

    def table(self, rows: Mapping[str, Mapping[str, float]], title: str) -> None:
        """A row of figures for each name."""
        columns = list(dict.fromkeys(name for figures in rows.values() for name in figures))
        lines = [[title, *columns]]
        lines += [[f"  {n}", *(f"{f[c]:.4g}" if c in f else "" for c in columns)] for n, f in rows.items()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        self.say("")
        for first, *others in lines:
            cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
            self.say("  ".join([f"{first:<{widths[0]}}", *cells]))

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def close(self, rows: dict[str, Any]) -> None:
        """The closing table: one line each, never cut, so that a path can be copied."""
        self.stop()
        self.say("")
        width = max(map(len, rows))
        for name, value in rows.items():
            self.say(f"{name:<{width}}  {value}")

    def _mean(self) -> dict[str, float]:
        """The figures over windows of so many steps each, as if they had been one."""
        mean = {}
        for name in (*(f"train/{metric.name}" for metric in self.metrics), "train/data_wait_share"):
            if measured := [(n, figures[name]) for n, figures in self.windows if name in figures]:
                mean[name] = sum(n * value for n, value in measured) / sum(n for n, _ in measured)
        took = sum(n / max(1e-9, figures["train/images_per_s"]) for n, figures in self.windows)
        return {**mean, "train/images_per_s": sum(n for n, _ in self.windows) / took}

    def _trained(self, figures: dict[str, float]) -> str:
        learnt = self._learnt(figures, "train") or "no good step"
        speed = f"{figures['train/images_per_s']:,.0f} images/s"
        return f"{learnt}  {speed}  data wait {figures['train/data_wait_share']:3.0%}"

    def _learnt(self, figures: dict[str, float], of: str) -> str:
        """The task's metrics, in a width that stays."""
        measured = [
            (metric, figures[f"{of}/{metric.name}"]) for metric in self.metrics if f"{of}/{metric.name}" in figures
        ]
        return "  ".join(
            f"{metric.name} " + (f"{value:6.2%}" if metric.unit == "%" else f"{value:.4f} {metric.unit}".rstrip())
            for metric, value in measured
        )
