"""Weights & Biases as a view of the record: it may be away, slow or dead, and training goes on."""

import logging
import math
import os
import secrets
import signal
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from queue import Full, Queue
from shlex import quote
from typing import Any

from syncbn.trainer.display.wandb_pictures import images_of
from syncbn.trainer.errors import UserError
from syncbn.trainer.option import option
from syncbn.trainer.runs.metric import Metric
from syncbn.trainer.runs.pictures import Pictures

log = logging.getLogger(__name__)

LOGGED_AT_ONCE = 100  # acts of the past that W&B need not answer one by one
WAITING = 4096  # acts that may wait for W&B: 30 s of a hundred a second


@dataclass
class WandbConfig:
    mode: str = option(
        "offline", "offline: files in the run's folder, nothing sent; online: sent as well; disabled: neither"
    )
    project: str = option("syncbn", "where W&B keeps the run")
    entity: str | None = option(None, "user or team that the project belongs to; none: the account's default")
    group: str | None = option(None, "none: the run's name without its seed, so that seeds lie together")
    job_type: str = option("train", "kind of run, to filter by in W&B")
    tags: list[str] = option(list, "words to filter by in W&B")
    timeout_s: float = option(
        30.0, "no answer of W&B for so long: the run goes on offline; also the longest wait at the end"
    )

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online", "disabled"):
            raise UserError(f"wandb.mode={self.mode}: choose one of offline, online, disabled")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise UserError(f"wandb.timeout_s={self.timeout_s}: must be positive and finite")


Table = tuple[list[str], list[list[Any]]]
"""Names of columns, and rows."""

Act = partial[Any]
"""Something to be done, but for the W&B run to do it with."""


class Tracker:
    """One W&B run, which costs the training thread no more than putting a figure onto a queue.

    A thread of its own starts W&B and hands it what comes. After each act it asks for a sign of life, since wandb hands
    figures to a stopped wandb-core without a word. Another thread kills a wandb-core (a child of this process, found in
    /proc) that has not answered for `timeout_s`, so that what waits for it raises.

    Whatever fails (no server, no key, a wandb-core that died), a new wandb-core begins an offline run of the same id,
    to which all figures, pictures and summaries so far are logged again: a killed wandb-core leaves next to nothing in
    its file. One warning says so, and `files` is the new folder. When a third run fails as well, W&B is left out with a
    last warning and `failure` says why; at once when WAITING acts are waiting, or when something else than wandb-core
    keeps the thread for `2 timeout_s`.

    An offline run is whole by itself: it is first told what earlier processes logged, unless W&B's server has that. The
    run's older offline folders are then marked as `wandb sync` marks what it has sent, so that no step is sent twice.

    `finish` waits for `timeout_s` at most. A wandb-core that is not done in half of it is killed, and the offline run
    has the other half. wandb's own atexit hook, which would wait without end, goes with each wandb-core, and its
    telemetry (WANDB_ERROR_REPORTING), which would wait for the server at exit, is off.

    Neither the command line nor git nor code is recorded: all may hold secrets. `settings` must hold none.

    Args:
        folder: The run's; W&B's files go to its wandb/.
        run_id: W&B's id of a run to go on with, as `run_id` was; None for a new one.
        earlier: step and figures of each line that this run has logged already, in an earlier process.
        metrics: those of the task: of the headline, W&B's summary has the best value too.
    """

    def __init__(
        self,
        config: WandbConfig,
        folder: Path,
        *,
        name: str,
        group: str,
        settings: dict[str, Any],
        run_id: str | None = None,
        earlier: Iterable[tuple[int, dict[str, float]]] = (),
        metrics: Sequence[Metric] = (),
    ):
        self.run: Any = None
        self.failure: str | None = None
        # The agent of a W&B sweep has named the run that it waits for
        of_sweep = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
        self.run_id = run_id or of_sweep or secrets.token_hex(4)
        self._timeout_s = config.timeout_s
        self._acts: Queue[Act] = Queue(WAITING)
        self._earlier: list[Act] = []  # what an offline run is told first
        self._history: list[Act] = []  # what a run that takes over is told
        self._since = math.inf  # time.monotonic() when W&B was asked for what it has not answered yet
        self._silence = ""  # why wandb-core was killed
        self._ended = threading.Event()
        if config.mode == "disabled":
            self._ended.set()
            return
        if not _is_sent(folder / "wandb", self.run_id):
            self._earlier = [packed(partial(_log, step, figures)) for step, figures in earlier]
        begin = partial(
            _begin, config, folder, name=name, group=group, settings=settings, run_id=self.run_id, metrics=metrics
        )
        threading.Thread(target=self._work, args=(begin, config.mode), name="wandb", daemon=True).start()
        threading.Thread(target=self._guard, name="wandb-guard", daemon=True).start()

    @property
    def files(self) -> Path | None:
        """The folder of this run's W&B files."""
        return None if self.run is None else Path(self.run.settings.sync_dir)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._put(partial(_log, step, figures))

    def alert(self, title: str, text: str) -> None:
        """Have W&B tell the user, as they have chosen there: by mail, say."""
        self._put(partial(_alert, title, text))

    def show(self, pictures: Pictures, drawings: Mapping[str, Callable[[], Any]] | None = None) -> None:
        """Log the pictures of an evaluation, beside its figures.

        drawings: what else to log, by W&B's name for it; each is drawn by W&B's thread, and so costs the training none.
        """
        self._put(partial(_show, pictures, drawings or {}))

    def keep(self, pictures: dict[str, Any], tables: dict[str, Table], summary: dict[str, Any]) -> None:
        """Log what a run comes to: pictures, tables, and what is to stand in its summary."""
        self._put(partial(_keep, pictures, tables, summary))

    def finish(self, exit_code: int = 0) -> None:
        """End the run. Returns within timeout_s, whatever W&B does."""
        self._put(partial(_finish, exit_code))
        for _ in range(2):
            if self._ended.wait(self._timeout_s / 2):
                return
            self._kill_service(self._timeout_s / 2)
        self._leave_out(f"it did not end within {self._timeout_s:g} s")

    def _put(self, act: Act) -> None:
        if self.failure is not None or self._ended.is_set():
            return
        try:
            self._acts.put_nowait(act)
        except Full:
            self._leave_out(f"{WAITING} figures are waiting for it")

    def _leave_out(self, failure: str) -> None:
        if self.failure is None:
            self.failure = failure
            log.warning("W&B failed and is left out from here on (%s); metrics.jsonl has every figure", failure)

    def _work(self, begin: Callable[[str], Any], mode: str) -> None:
        """The thread that alone speaks with W&B: in three runs at most, each of which takes over from the last."""
        reason = ""
        try:
            for attempt in (mode, "offline", "offline"):
                self._silence = ""
                try:
                    self._one_run(begin, attempt, reason)
                    return
                except (Exception, SystemExit) as error:  # whatever it is, it is not the training's
                    reason = self._silence or f"{type(error).__name__}: {error}".splitlines()[0]
                with self._asking():
                    abandon_service()
            self._leave_out(reason)
        finally:
            abandon_service()
            self._ended.set()

    def _one_run(self, begin: Callable[[str], Any], mode: str, reason: str) -> None:
        """Begin a run, tell it what is known, then what comes, until it is finished. Raises whatever W&B raises."""
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # its telemetry asks the server at exit, and waits for up to 30 s
        import wandb  # noqa: F401  only rank 0 tracks, and only if it is wanted; takes seconds, so before the clock runs

        with self._asking():
            self.run = begin(mode)
        if reason:
            log.warning("W&B failed (%s); the run goes on offline, with all its figures, in %s", reason, self.files)
        for number, act in enumerate([*(self._earlier if mode == "offline" else ()), *self._history], start=1):
            self._do(act, answered=number % LOGGED_AT_ONCE == 0)
        if mode == "offline" and self.files:
            for older in _unsent(self.files.parent, self.run_id) - {self.files}:
                _mark_sent(older)
        while self.failure is None and not (self._history and self._history[-1].func is _finish):
            act = self._acts.get()
            self._history.append(packed(act))
            self._do(act)
            if act.func is _alert:  # nobody wants it twice
                self._history.pop()
            if act.func is _show:  # the last will do for a run that takes over
                self._history = [each for each in self._history if each is act or each.func is not _show]

    def _do(self, act: Act, *, answered: bool = True) -> None:
        with self._asking():
            act(self.run)
            if answered and act.func is not _finish:
                self.run.status()  # comes back if wandb-core is alive: it is handed figures without a word

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """A block that waits for W&B: silence counts from its beginning to its end, and not between two of them."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = math.inf

    def _guard(self) -> None:
        """Kill a wandb-core that does not answer, and leave W&B out if its thread waits for something else."""
        while not self._ended.wait(self._timeout_s / 20):
            waited_s = time.monotonic() - self._since
            if waited_s > 2 * self._timeout_s:
                self._leave_out(f"no answer for {waited_s:.1f} s")
            if waited_s > self._timeout_s:
                self._kill_service(waited_s)

    def _kill_service(self, waited_s: float) -> None:
        self._silence = f"no answer for {waited_s:.1f} s"
        kill_services()


def _begin(
    config: WandbConfig,
    folder: Path,
    mode: Any,
    *,
    name: str,
    group: str,
    settings: dict[str, Any],
    run_id: str,
    metrics: Sequence[Metric],
) -> Any:
    import wandb

    os.environ.pop("WANDB_SERVICE", None)  # the wandb-core of a parent, say: this one must be our own
    wandb.setup(wandb.Settings(silent=True))  # without it a missing key is asked for, if there is a terminal
    run = wandb.init(
        mode=mode,
        id=run_id,
        resume="allow",
        dir=folder,
        project=config.project,
        entity=config.entity,
        group=config.group or group,
        job_type=config.job_type,
        tags=config.tags,
        name=name,
        config=settings,
        settings=wandb.Settings(
            silent=True,
            console="off",
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            init_timeout=0.9 * config.timeout_s,  # its own errors say more than its death
            finish_timeout=0.4 * config.timeout_s,
            finish_timeout_raises=True,
        ),
    )
    run.define_metric("train/*", step_metric="step")
    run.define_metric("eval/*", step_metric="step")
    run.define_metric("drift/*", step_metric="step")
    for metric in metrics:
        if metric.headline:
            best = "max" if metric.better == "more" else "min"
            run.define_metric(f"eval/{metric.name}", summary=f"{best},last")
    return run


def _is_sent(wandb_folder: Path, run_id: str) -> bool:
    """Whether W&B's server has what earlier processes logged: they were online, or it was sent since."""
    return any(wandb_folder.glob(f"*run-*-{run_id}")) and not _unsent(wandb_folder, run_id)


def _unsent(wandb_folder: Path, run_id: str) -> set[Path]:
    """The folders of a run's processes that were offline and have not been sent."""
    return {folder for folder in wandb_folder.glob(f"offline-run-*-{run_id}") if not any(folder.glob("*.wandb.synced"))}


def _mark_sent(folder: Path) -> None:
    """Have `wandb sync` pass over it."""
    with suppress(OSError):
        for file in folder.glob("*.wandb"):
            file.with_suffix(".wandb.synced").touch()


def _log(step: int, figures: dict[str, float], run: Any) -> None:
    run.log({"step": step, **figures}, step=step)


def _log_packed(step: int, names: tuple[str, ...], values: array, run: Any) -> None:
    _log(step, dict(zip(names, values, strict=True)), run)


def packed(act: Act) -> Act:
    """The same act in little memory: 8 bytes a figure, for there may be millions."""
    if act.func is not _log:
        return act
    step, figures = act.args
    return partial(_log_packed, step, _same(tuple(figures)), array("d", figures.values()))


@cache
def _same(names: tuple[str, ...]) -> tuple[str, ...]:
    """One tuple for all that are equal."""
    return names


def _alert(title: str, text: str, run: Any) -> None:
    run.alert(title=title, text=text, wait_duration=0)


def _show(pictures: Pictures, drawings: Mapping[str, Callable[[], Any]], run: Any) -> None:
    import wandb

    logged: dict[str, Any] = {name: wandb.Image(draw()) for name, draw in drawings.items()}
    if pictures.each:
        logged["eval/pictures"] = images_of(pictures)
    run.log({"step": pictures.step, **logged}, step=pictures.step)


def _keep(pictures: dict[str, Any], tables: dict[str, Table], summary: dict[str, Any], run: Any) -> None:
    import wandb

    logged: dict[str, Any] = {name: wandb.Image(picture) for name, picture in pictures.items()}
    logged |= {name: wandb.Table(columns=[*columns], data=rows) for name, (columns, rows) in tables.items()}
    if logged:
        run.log(logged)
    run.summary.update(summary)


def _finish(exit_code: int, run: Any) -> None:
    import wandb

    try:
        run.finish(exit_code=exit_code)
    except TimeoutError:
        log.warning("W&B has not taken all yet: wandb sync %s sends the rest", quote(str(run.settings.sync_dir)))
    with suppress(Exception, SystemExit):
        wandb.teardown()  # else its atexit hook does it, and waits without end


def kill_services() -> None:
    """Kill every wandb-core that is a child of this process, a stopped one too."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = stat.read_text().rpartition(")")  # 71 (wandb-core) S 70 ...: pid, name, state, parent
            if name.endswith("(wandb-core") and int(rest.split()[1]) == os.getpid():
                os.killpg(int(stat.parent.name), signal.SIGKILL)  # the leader of a session of two


def abandon_service() -> None:
    """Have wandb forget its wandb-core: the next run starts a new one, and no atexit hook waits for the old."""
    kill_services()
    with suppress(Exception, SystemExit):  # it tells a dead process to end, and ends with its exit code
        import wandb

        wandb.teardown()
