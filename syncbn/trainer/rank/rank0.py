"""Rank 0's eyes on a run: what is shown, written down, sent to W&B and saved."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from syncbn import Reading
from syncbn.trainer.errors import INCOMPLETE, PREEMPTED, one_line
from syncbn.trainer.rank.carriers import Carriers
from syncbn.trainer.report import for_wandb, page
from syncbn.trainer.runs.checkpoint import Checkpoints, pointed
from syncbn.trainer.runs.folder import RunFolder
from syncbn.trainer.runs.metric import Metric, headline, in_words
from syncbn.trainer.runs.pictures import Shown, pictures_of, write_pictures
from syncbn.trainer.training import drift

log = logging.getLogger(__name__)


class Watch:
    """Rank 0's eyes on a training: screen, record, W&B and checkpoints."""

    def __init__(
        self,
        folder: RunFolder,
        carriers: Carriers,
        metrics: Sequence[Metric],
        settings: dict[str, Any],
        norm: str,
        sizes: dict[str, int],
    ):
        """
        metrics: of the task. settings: the config as it was given, without secrets. norm: what was converted, in words.
        sizes: ranks and global_batch, for the result.
        """
        self.folder, self.carriers, self.metrics = folder, carriers, metrics
        self.settings, self.norm, self.sizes = settings, norm, sizes
        self.screen, self.record, self.tracker = carriers.screen, carriers.record, carriers.tracker
        self.checkpoints, self.pulse, self.story = carriers.checkpoints, carriers.pulse, carriers.story
        self.objective = f"eval/{headline(metrics).name}"
        self.missing: list[str] = []
        self._now("starting")
        self.screen.start()

    def stepped(self, step: int) -> None:
        self.screen.stepped(step)
        if self.pulse.status.state != "training":
            self._now("training", step=step)

    def evaluating(self, step: int) -> None:
        self._now("evaluating", step=step)

    def log(self, step: int, figures: dict[str, float], reading: Reading | None = None) -> None:
        read: dict[str, Any] = {}
        if reading:
            figures = {**figures, **drift.flat(reading.layers)}
            read["drift/verdicts"] = [verdict.text for verdict in reading.verdicts]
            self._tell(step, reading)
        elif self.story.last:  # an evaluation, and what was read just before
            read["drift/rank_z"] = self.story.last.rank_z
        self.record.log(step, {**figures, **read})
        self.tracker.log(step, figures)
        self.screen.log(step, figures)
        news = {"images_per_s": "train/images_per_s", "objective": self.objective}
        news = {name: figures[key] for name, key in news.items() if key in figures}
        self._now("training", step=step, epoch=figures["epoch"], **news)

    def show(self, step: int, shown: Shown) -> None:
        """Keep the pictures and charts of an evaluation; where the disk has no room, the run goes on without them."""
        if not (shown.pictures or shown.charts):
            return
        pictures = pictures_of(step, shown)
        try:
            write_pictures(self.folder.pictures, pictures)
        except OSError as error:
            log.warning("the pictures of step %d are not written: %s", step, error)
        self.tracker.show(pictures, for_wandb.drawings_of(pictures))

    def _now(self, state: str, **figures: Any) -> None:
        self.pulse.tell(state, pointed(self.folder.checkpoints / "latest"), **figures)

    def _tell(self, step: int, reading: Reading) -> None:
        for verdict in self.story.add(step, reading):
            self.tracker.alert(f"{self.folder.path.name}: {verdict.kind}", f"step {step}: {verdict.text}")
        self.screen.drift(step, reading.verdicts)

    def keep(self, step: int, state: dict[str, Any], *, best: bool) -> None:
        """Save a training's state, with what has to be known of this one to go on with it in another process."""
        watch = self.carriers.state_dict()
        self.checkpoints.save(step, {**state, "config": self.settings, "watch": watch}, best=best)

    def give_up(self, error: BaseException) -> None:
        """Close all files after an error."""
        self._close_files()
        self._now("failed", error=one_line(str(error) or type(error).__name__))
        self.screen.stop()
        self._report()
        self.tracker.finish(exit_code=1)

    def preempted(self, step: int) -> None:
        """Leave the run so that another process can go on with it."""
        self._close_files()
        self._now("preempted", step=step)
        self.screen.stop()
        self.tracker.finish(exit_code=PREEMPTED)
        lost = f"; {', '.join(self.missing)} could not be written" if self.missing else ""
        latest = self.checkpoints.latest
        next_time = f"goes on from {latest}" if latest else "begins anew, as there is no checkpoint yet"
        self.screen.say(f"preempted at step {step}{lost}: the same command {next_time}")

    def finish(self, figures: dict[str, float]) -> int:
        """Write the result, and show what the run came to: the exit code. What could not be written is `missing`.

        A run with a result is finished for good, so one that lacks something gets none.
        """
        duration_s = self.record.time_s
        figures = {name: value for name, value in figures.items() if name.startswith("eval/")}
        result: dict[str, Any] = {
            "objective": figures[self.objective],
            "metrics": figures,
            **self.sizes,
            "duration_s": round(duration_s, 1),
        }
        if self.story.last:
            result["drift"] = {"verdicts": self.story.verdicts}
        self._close_files()
        if not self.missing:
            with self._or_missing(self.folder.result):
                self.folder.write_result(result)
        if self.missing:
            self._now("failed", error=self.incomplete())
        else:
            self._now("finished")
        self._report()
        self.tracker.finish()
        self.screen.stop()
        if worst := self.story.worst_layers():
            self.screen.table(worst, "worst layers")
        self.screen.close(
            {
                **in_words(figures, self.metrics),
                "norm": self.norm.removeprefix("norm="),
                **{f"drift{' ' * i}": text for i, text in enumerate(self.what_drifted())},
                "time": f"{duration_s:.0f} s",
                **self.where_to_look(),
            }
        )
        if self.missing:
            print(f"error: {self.incomplete()}", file=sys.stderr, flush=True)
        return INCOMPLETE if self.missing else 0

    def incomplete(self) -> str:
        """What to tell of a run that came to its end, but is missing something."""
        return (
            f"{self.folder.path} was trained to the end, but lacks what could not be written "
            f"({'; '.join(self.missing)}): make room for it and give the same command again, which goes on from the "
            "last checkpoint"
        )

    def _report(self) -> None:
        """Write report.html and give its heat maps to W&B; what goes wrong with it costs the run nothing."""
        try:
            page.write_report(self.folder.path)
            pictures, tables = for_wandb.maps_of(self.folder.path)
        except Exception as error:
            log.warning("the report is not whole: %s", error)
            return
        self.tracker.keep(
            pictures=pictures,
            tables=tables,
            summary={f"verdict{i or ''}": text for i, text in enumerate(self.what_drifted())},
        )

    def _close_files(self) -> None:
        self.checkpoints.close()
        if self.checkpoints.problem:
            self.missing.append(self.checkpoints.problem)
        with self._or_missing(self.folder.metrics):
            self.record.close()

    @contextmanager
    def _or_missing(self, file: Path) -> Iterator[None]:
        """A block of writing whose OSError is told, and costs the run no more than that."""
        try:
            yield
        except OSError as error:
            log.warning("%s is not whole: %s", file, error)
            self.missing.append(file.name)

    def what_drifted(self) -> list[str]:
        """The verdicts of the whole run, in order of weight."""
        verdicts = [f"{verdict['text']}, {when(verdict)}" for verdict in self.story.verdicts]
        return verdicts or ["ok" if self.story.last else "not measured"]

    def where_to_look(self) -> dict[str, Any]:
        rows = {
            "run": f"{self.folder.path}/",
            "report": self.folder.report,
            "figures": self.folder.metrics,
            "weights": Checkpoints(self.folder.checkpoints).latest or "none",
        }
        if self.tracker.failure:
            return {**rows, "W&B": f"failed: {self.tracker.failure}"}
        if files := self.tracker.files:
            files = files.relative_to(Path.cwd()) if files.is_relative_to(Path.cwd()) else files
            return {**rows, "look": f"wandb leet {quote(str(files))}", "upload": f"wandb sync {quote(str(files))}"}
        return rows


def when(verdict: dict[str, Any]) -> str:
    first, last = verdict["first_step"], verdict["last_step"]
    return f"step {first}" if first == last else f"steps {first} to {last}"
