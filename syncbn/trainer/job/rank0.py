"""Rank 0's eyes on a run: what is shown, written down, sent to W&B and saved."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from syncbn import Reading
from syncbn.trainer import data, norms
from syncbn.trainer.config import Config, as_dict
from syncbn.trainer.display.screen import Screen
from syncbn.trainer.display.wandb_run import Tracker, WandbConfig
from syncbn.trainer.errors import INCOMPLETE, PREEMPTED, one_line
from syncbn.trainer.files import put_file
from syncbn.trainer.job.build import Parts
from syncbn.trainer.redact import redacted
from syncbn.trainer.report import page, plots
from syncbn.trainer.runs.checkpoint import Checkpoints, pointed
from syncbn.trainer.runs.folder import RunFolder
from syncbn.trainer.runs.metric import headline, in_words
from syncbn.trainer.runs.pictures import PNG, Pictures, write_pictures
from syncbn.trainer.runs.reader import read_run
from syncbn.trainer.runs.record import Record
from syncbn.trainer.runs.status_file import Pulse
from syncbn.trainer.tasks import Picture
from syncbn.trainer.training import drift
from syncbn.trainer.training.drift import Story
from syncbn.trainer.training.state import Training
from syncbn.trainer.world import World

log = logging.getLogger(__name__)


class Watch:
    """Rank 0's eyes on a training: screen, record, W&B and checkpoints."""

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        ranks: World,
        parts: Parts,
        training: Training,
        state: dict[str, Any] | None = None,
    ):
        """state: what state_dict gave in the process that is gone on from."""
        self.folder, self.config, self.ranks = folder, config, ranks
        self.metrics = parts.task.metrics
        self.objective = f"eval/{headline(self.metrics).name}"
        folder.name_metrics(self.metrics)
        self.converted, self.global_batch = converted(parts, config), parts.data.global_batch
        steps = config.train.total_steps(parts.data.steps_per_epoch)
        self.screen = Screen(steps, metrics=self.metrics)
        self.screen.say(
            f"{config.data.name}, {data_set(parts.data)} | {config.model.name}, {self.converted} | "
            f"{images(ranks, parts)} on {ranks.device.type} | {steps} steps"
        )
        for note in parts.notes if not training.step else ():
            self.screen.say(note)
        if training.step:
            self.screen.say(f"going on from step {training.step}")
        if config.norm.name != "local" and not parts.converted.changed:
            log.warning("norm=%s converted nothing: %s", config.norm.name, norms.nothing_converted(parts.model))
        norm = norms.NORMS[config.norm.name]
        if norm.scope == "none" and norm.running and not config.model.weights and not training.step:
            log.warning("norm=frozen without model.weights=: statistics that were never taken stay as they began")
        for line in parts.converted.told:
            log.warning("norm=%s: %s", config.norm.name, line)
        state = state or {"record": None, "story": None, "wandb": None}
        self.record = Record(folder.metrics, state["record"])
        name = config.run.name or ""
        group = name.removesuffix(f"-seed{config.seed}")
        self.story = Story(state["story"])
        self.tracker = Tracker(
            WandbConfig(**redacted(asdict(config.wandb))),
            folder.path.absolute(),
            name=name,
            group=group,
            settings=redacted(as_dict(config)),
            run_id=state["wandb"],
            earlier=self.record.numbers(),
            metrics=self.metrics,
        )
        keep = config.checkpoint
        self.checkpoints = Checkpoints(folder.checkpoints, keep=keep.keep, background=keep.background)
        self.missing: list[str] = []
        self.pulse = Pulse(folder.status, step=training.step, steps=steps, epoch=training.epoch, world_size=ranks.size)
        self._now("starting")
        self.screen.start()

    def stepped(self, step: int) -> None:
        self.screen.stepped(step)
        if self.pulse.status.state != "training":
            self._now("training", step=step)

    def evaluating(self, step: int) -> None:
        self._now("evaluating", step=step)

    def log(self, step: int, figures: dict[str, float], reading: Reading | None = None) -> None:
        told: dict[str, Any] = {}
        if reading:
            figures = {**figures, **drift.flat(reading.layers)}
            told["drift/verdicts"] = [verdict.text for verdict in reading.verdicts]
            self._tell(step, reading)
        elif self.story.last:  # an evaluation, and what was read just before
            told["drift/rank_z"] = self.story.last.rank_z
        self.record.log(step, {**figures, **told})
        self.tracker.log(step, figures)
        self.screen.log(step, figures)
        news = {"images_per_s": "train/images_per_s", "objective": self.objective}
        news = {name: figures[key] for name, key in news.items() if key in figures}
        self._now("training", step=step, epoch=figures["epoch"], **news)

    def show(self, step: int, pictures: Sequence[Picture]) -> None:
        """Keep the pictures of an evaluation; where the disk has no room, the run goes on without them."""
        if not pictures:
            return
        pngs = Pictures(step, [PNG(picture.png(), picture.caption) for picture in pictures])
        try:
            write_pictures(self.folder.pictures, pngs)
        except OSError as error:
            log.warning("the pictures of step %d are not written: %s", step, error)
        self.tracker.show(pngs)

    def _now(self, state: str, **figures: Any) -> None:
        self.pulse.tell(state, pointed(self.folder.checkpoints / "latest"), **figures)

    def _tell(self, step: int, reading: Reading) -> None:
        for verdict in self.story.add(step, reading):
            self.tracker.alert(f"{self.config.run.name}: {verdict.kind}", f"step {step}: {verdict.text}")
        self.screen.drift(step, reading.verdicts)

    def keep(self, step: int, state: dict[str, Any], *, best: bool) -> None:
        """Save a training's state, with what has to be known of this one to go on with it in another process."""
        mine = {
            "record": self.record.state_dict(),
            "story": self.story.state_dict(),
            "wandb": self.tracker.run_id,
        }
        self.checkpoints.save(step, {**state, "config": redacted(as_dict(self.config)), "watch": mine}, best=best)

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
            "ranks": self.ranks.size,
            "global_batch": self.global_batch,
            "duration_s": round(duration_s, 1),
        }
        if self.story.last:
            result["drift"] = {"verdicts": self.story.verdicts}
        self._close_files()
        if not self.missing:
            with self._or_missing(self.folder.result), put_file(self.folder.result) as file:
                file.write(json.dumps(result, indent=1).encode() + b"\n")
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
                "norm": self.converted.removeprefix("norm="),
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
            maps = page.heat_maps(read_run(self.folder.path))
            pictures = {f"drift/map_{name}": plots.picture(figure) for name, (_, figure) in maps.items()}
        except Exception as error:
            log.warning("the report is not whole: %s", error)
            return
        self.tracker.keep(
            pictures=pictures,
            tables={f"drift/by_{name}": (["layer", g.along, name], g.cells()) for name, (g, _) in maps.items()},
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
        told = [f"{verdict['text']}, {when(verdict)}" for verdict in self.story.verdicts]
        return told or ["ok" if self.story.last else "not measured"]

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


def data_set(of: data.Data) -> str:
    """How many images there are of how many classes, in words."""
    counts = of.fingerprint
    return f"{counts['train']} + {counts['eval']} images of {counts['classes']} classes"


def images(ranks: World, parts: Parts) -> str:
    """How many images each rank takes at once, in words."""
    each, left = divmod(parts.data.global_batch, ranks.size)
    return f"{parts.data.global_batch} images over {ranks.size} ranks" if left else f"{ranks.size} × {each} images"


def when(verdict: dict[str, Any]) -> str:
    first, last = verdict["first_step"], verdict["last_step"]
    return f"step {first}" if first == last else f"steps {first} to {last}"


def converted(parts: Parts, config: Config) -> str:
    changed, found, _ = parts.converted
    return f"norm={config.norm.name}: {changed} of {found} batch norm layers converted"
