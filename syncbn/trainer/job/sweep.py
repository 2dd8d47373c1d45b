"""A sweep: what there is to do, told before it begins; each point, wherever it is run; and what it all came to."""

import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from syncbn.trainer.config import explain, typed
from syncbn.trainer.errors import FAILED, PREEMPTED, USER_ERROR, Ended, RanksFailed, UserError, one_line
from syncbn.trainer.job import sweep_plan
from syncbn.trainer.redact import redacted
from syncbn.trainer.report import comparison, page
from syncbn.trainer.report.tables import duration
from syncbn.trainer.runs import sweep_folder
from syncbn.trainer.runs.folder import RunFolder
from syncbn.trainer.runs.options import RunConfig
from syncbn.trainer.runs.sweep_folder import Point, Sweep

OF_LAUNCHERS = ("submitit", "joblib")  # modules whose errors tell of a process that ended, and not of our code

_begun: list[Path] = []  # the folder of the sweep that this process was started for


def begin(config: DictConfig) -> None:
    """Tell what is swept, and write it down. config: the sweep's own; its folder is set in it, for all points.

    Raises UserError, and Hydra's errors for a key or choice that there is not, before the first point begins.
    """
    sweep, name = sweep_plan.planned(config)
    folder = Path(config.run.root) / name
    _refuse_run(folder)
    sweep_plan.lay_down(config.hydra, name, sweep)
    sweep_folder.write_plan(folder, sweep)
    _begun.append(folder)
    if config.hydra.runtime.choices["hydra/launcher"] == "joblib":
        signal.signal(signal.SIGINT, _leave_to_workers)
    count = f"{sweep.total} points" if sweep.total else "a sweep"
    print(f"{count}: {' × '.join(sweep.swept)}, in {folder}/", flush=True)


def one_point(composed: DictConfig, run: Callable[[DictConfig], float]) -> float | None:
    """One point of a sweep, wherever the launcher has it run: its objective, for a sweeper; None if it has none.

    It raises nothing that it can tell: what became of it stands in the sweep's folder, and the sweep goes on. One that
    was asked to end ends the sweep: the points after it are not begun.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.sweep.dir)
    sweep = sweep_folder.read_sweep(folder)
    jobs_of_their_own = str(hydra.runtime.choices["hydra/launcher"]).startswith("submitit")
    if sweep.asked_to_end and not jobs_of_their_own:
        return None
    choices = redacted(sweep_plan.choices(sweep_plan.task_words(hydra), sweep.swept))
    place = sweep.place(choices)
    number = (hydra.job.num if place is None else place) + 1
    name = f"point {number}" + (f" of {sweep.total}" if sweep.total else "")
    print(f"{name}: {sweep_folder.words(choices)}{_left(sweep)}", flush=True)
    point = Point(choices)
    began = time.time()
    with suppress(UserError):
        point.run = sweep_plan.run_name(typed(composed), hydra)
    try:
        point.objective, point.state = run(composed), "finished"
        if _trained_since(began, composed, point):
            point.took_s = round(time.time() - began, 1)
    except BaseException as error:
        point.exit_code, point.reason = _end_of(error)
        point.state = sweep_folder.ENDS.get(point.exit_code, "failed")
        if jobs_of_their_own:
            own = str(hydra.launcher.submitit_folder).replace("%j", str(hydra.job.id))
            point.reason += f" (what it said is in {own})"
        print(redacted(f"{name} {point.state}: {point.reason}"), file=sys.stderr, flush=True)
        if not isinstance(error, Exception):
            raise
    finally:
        point.ended = time.time()
        _record(folder, point)
    return point.objective


def to_its_end(job: Callable[[], int]) -> int:
    """Run job, which may turn out to be a sweep; then show what that came to. Returns the exit code."""
    try:
        code = job()
    except (Exception, KeyboardInterrupt) as error:
        if not _begun:
            raise
        code = _broken(error)
    return end(_begun.pop(), code) if _begun else code


def end(folder: Path, code: int = 0) -> int:
    """Show what the sweep came to, and write it down: the exit code. code: that of the sweep's command itself."""
    (folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's; sweep.json has what is in it, without secrets
    sweep = sweep_folder.read_sweep(folder)
    print(f"\n{comparison.as_text(comparison.table(sweep))}\n")
    for line in comparison.reasons(sweep):
        print(line)
    try:
        sweep_folder.write_plan(folder, sweep)
        print(f"report  {page.write_report(folder)}\ntable   {folder / sweep_folder.NAME}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    undone = [point for point in sweep.points if not point.done]
    code = next((p.exit_code for p in sorted(undone, key=lambda p: p.exit_code != PREEMPTED) if p.exit_code), code)
    if undone or code:
        print(_how_to_go_on(sweep, undone), flush=True)
    return code or (FAILED if undone else 0)


def _how_to_go_on(sweep: Sweep, undone: Sequence[Point]) -> str:
    refused = sum(point.state == "refused" for point in undone)
    mend = " (those that were refused need other words)" if refused else ""
    return f"{comparison.tally(sweep)}: the same command goes on with what is not finished{mend}"


def _refuse_run(folder: Path) -> None:
    RunFolder(RunConfig(name=folder.name, root=str(folder.parent))).refuse_unwritable()
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run, and is the place for this sweep: rename it, or give another run.root=")


def _leave_to_workers(*_: object) -> None:
    """Ctrl-C reaches joblib's workers too, whose points save and end; joblib would kill them. Again: as ever."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("asked to end: the points that are being trained save first", file=sys.stderr, flush=True)


def _record(folder: Path, point: Point) -> None:
    try:
        sweep_folder.write_point(folder, point)
    except OSError as error:  # it costs the sweep a row, and the run nothing
        print(
            f"warning: what became of {point.words} cannot be written to {folder} ({error.strerror})", file=sys.stderr
        )


def _left(sweep: Sweep) -> str:
    """The time left, by how long it took to train the points since the sweep began."""
    trained = [point for point in sweep.points if point.took_s and point.ended >= sweep.began]
    behind = [point for point in sweep.points if point.done or point.ended >= sweep.began]
    if not trained or not sweep.total:
        return ""
    each_s = (time.time() - sweep.began) / len(trained)
    return f"  (about {duration(each_s * (sweep.total - len(behind)))} left)"


def _trained_since(began: float, composed: DictConfig, point: Point) -> bool:
    """Whether the run of a point was not finished already."""
    if point.run is None:
        return True
    result = RunFolder(RunConfig(name=point.run, root=composed.run.root)).result
    return result.exists() and result.stat().st_mtime >= began


def _end_of(error: BaseException) -> tuple[int, str]:
    """The exit code and the reason of a point that ended in an error."""
    if isinstance(error, Ended) or not isinstance(error, Exception):
        return PREEMPTED, "asked to end; what it had saved is kept"
    if isinstance(error, RanksFailed):
        if error.exit_code == PREEMPTED:
            return PREEMPTED, "asked to end; what it had saved is kept"
        return max(error.exit_code, FAILED), error.reason or str(error)
    if isinstance(error, UserError):
        return USER_ERROR, str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return USER_ERROR, explain(error)
    traceback.print_exception(error)
    return FAILED, one_line(f"{type(error).__name__}: {error}")


def _broken(error: BaseException) -> int:
    """What to end with if the sweep itself is: an interruption, a lost worker, or an error of ours."""
    if isinstance(error, KeyboardInterrupt):
        return PREEMPTED
    if str(error) == "No trials are completed yet.":  # Optuna's end where no point is finished; each has been told
        return FAILED
    if type(error).__module__.partition(".")[0] in OF_LAUNCHERS:
        print(f"error: {type(error).__name__}: {one_line(str(error))}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    return FAILED
