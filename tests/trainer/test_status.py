"""What is told of runs from outside: honest after a kill, whole for every name, and legal for Prometheus."""

import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from syncbn.trainer import status
from syncbn.trainer.errors import UserError
from syncbn.trainer.runs import lock, status_file
from syncbn.trainer.runs.status_file import Pulse
from tests.trainer.another_process import another
from tests.trainer.made_runs import make_run

ROOT = Path(__file__).parents[2]


def tell(folder, state, checkpoint=None, *, step=0, **figures):
    """A run's folder in which a process of ours has told its state."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").touch()
    teller = Pulse(folder / status_file.NAME, step=step, steps=100, epoch=step / 50, world_size=2)
    teller.tell(state, checkpoint, step=step, **figures)
    return teller.status


def running(folder, state="training", **figures):
    """A process that holds the run's lock and tells its state."""

    def job(say):
        with lock.held(folder, longest_s=0):
            tell(folder, state, **figures)
            say("told")
            time.sleep(60)

    return another(job)


def states(root):
    return {seen.name: seen.state for seen in status.runs([root])}


def test_what_was_told_is_read_again(tmp_path):
    written = tell(tmp_path / "r", "training", Path("x/step_000000040.pt"), step=42, images_per_s=99.5, objective=0.5)
    seen = status_file.read_status(tmp_path / "r" / status_file.NAME)
    assert seen == written
    assert (seen.state, seen.step, seen.checkpoint, seen.checkpoint_step) == ("training", 42, "step_000000040.pt", 40)
    assert (seen.images_per_s, seen.objective, seen.restarts, seen.pid) == (99.5, 0.5, 0, os.getpid())
    assert datetime.now(UTC) - status_file.when(seen.updated) < timedelta(minutes=1)
    assert not list(tmp_path.rglob("*.tmp"))


def test_each_start_in_the_folder_counts_as_a_restart_but_the_first(tmp_path):
    assert [tell(tmp_path / "r", "starting").restarts for _ in range(3)] == [0, 1, 2]
    (tmp_path / "r" / status_file.NAME).write_text("")  # as a crash of the machine may leave it
    assert tell(tmp_path / "r", "starting").restarts == 1


def test_what_json_has_no_word_for_is_left_unknown_and_no_secret_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    tell(tmp_path / "r", "failed", objective=math.nan, images_per_s=math.inf, error="it said 0123456789abcdef")
    seen = json.loads((tmp_path / "r" / status_file.NAME).read_text(), parse_constant=pytest.fail)
    assert (seen["objective"], seen["images_per_s"], seen["error"]) == (None, None, "it said ***")


BLAMED = {
    "its-own-word": ("failed", "lost", {"sure": True}, "failed", "the cause"),
    "not-its-own-word": ("failed", "lost", {}, "failed", "the cause (rank 0: lost)"),
    "rank-0": ("failed", "incomplete", {"rank": 0}, "failed", "incomplete"),
    "rank-0-was-killed": ("training", None, {"rank": 0}, "failed", "the cause"),
    "preempted": ("preempted", None, {}, "preempted", None),
    "finished": ("finished", None, {}, "finished", None),
    "an-earlier-start": ("failed", "lost", {"since": "2100-01-01T00:00:00Z"}, "failed", "lost"),
}


@pytest.mark.parametrize("before, error, words, after, error_after", BLAMED.values(), ids=BLAMED)
def test_a_run_that_failed_tells_the_cause_that_its_launcher_knows(tmp_path, before, error, words, after, error_after):
    since = tell(tmp_path / "r", before, error=error).started
    status_file.blame(
        tmp_path / "r" / status_file.NAME, cause="the cause", **{"rank": 1, "sure": False, "since": since, **words}
    )
    seen = status_file.read_status(tmp_path / "r" / status_file.NAME)
    assert (seen.state, seen.error) == (after, error_after)


def test_a_run_that_is_another_jobs_by_now_is_not_blamed(tmp_path):
    since = lock.now()
    with running(tmp_path / "r") as (_, listen):
        listen()
        status_file.blame(tmp_path / "r" / status_file.NAME, 1, "the cause", sure=True, since=since)
        assert states(tmp_path) == {"r": "training"}
    status_file.blame(tmp_path / "nothing" / status_file.NAME, 1, "the cause", sure=True, since=since)
    assert not (tmp_path / "nothing").exists()


def test_a_disk_that_fails_costs_one_warning(tmp_path, caplog):
    teller = Pulse(tmp_path / "gone" / status_file.NAME, step=0, steps=1, epoch=0, world_size=1)
    teller.tell("training", None)
    teller.tell("training", None)
    assert len(caplog.records) == 1
    assert "training goes on" in caplog.text


def test_a_run_that_says_training_is_believed_only_while_its_process_lives(tmp_path):
    with running(tmp_path / "r", step=7) as (pid, listen):
        listen()
        assert states(tmp_path) == {"r": "training"}
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert states(tmp_path) == {"r": "died"}


@pytest.mark.parametrize("state", status_file.LIVE)
def test_a_killed_run_has_died_whatever_it_was_doing(tmp_path, state):
    tell(tmp_path / "r", state)
    assert states(tmp_path) == {"r": "died"}


@pytest.mark.parametrize("state", status_file.ENDED)
def test_what_ended_in_order_says_so(tmp_path, state):
    tell(tmp_path / "r", state)
    assert states(tmp_path) == {"r": state}


def test_a_job_that_has_the_lock_and_has_not_spoken_yet_is_starting(tmp_path):
    tell(tmp_path / "again", "finished")

    def job(say):
        with lock.held(tmp_path / "again", longest_s=0), lock.held(tmp_path / "first", longest_s=0):
            say("held")
            time.sleep(60)

    with another(job) as (_, listen):
        listen()
        assert states(tmp_path) == {"again": "starting", "first": "starting"}


def test_a_run_whose_last_word_was_lost_is_finished_if_it_left_a_result(tmp_path):
    tell(tmp_path / "r", "training")
    (tmp_path / "r" / "result.json").write_text("{}")
    assert states(tmp_path) == {"r": "finished"}


BROKEN = {
    "empty": "",
    "cut": '{"state": "train',
    "no-object": "[1]",
    "no-text": b"\xff\xfe",
    "unknown-state": lambda content: {**content, "state": "dreaming"},
    "missing": lambda content: {k: v for k, v in content.items() if k != "step"},
    "wrong-type": lambda content: {**content, "step": "many"},
    "no-time": lambda content: {**content, "updated": "yesterday"},
    "no-zone": lambda content: {**content, "started": "2026-11-22T18:00:00"},
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_status_is_told_and_the_others_are_shown(tmp_path, content):
    tell(tmp_path / "whole", "finished")
    tell(tmp_path / "broken", "training")
    path = tmp_path / "broken" / status_file.NAME
    if callable(content):
        content = json.dumps(content(json.loads(path.read_text())))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert states(tmp_path) == {"broken": "unreadable", "whole": "finished"}
    lines = status.plain(status.runs([tmp_path])).splitlines()
    assert any(line.startswith("broken: status.json: ") for line in lines)
    assert lines[-1] == "1 unreadable, 1 finished"
    assert 'syncbn_run_state{root="' in status.exposition(status.runs([tmp_path]))


def test_folders_that_are_no_runs_are_passed_over_and_runs_without_a_word_are_not(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / ".hidden").mkdir()
    make_run(tmp_path / "old", layers=1, logs=1)
    make_run(tmp_path / "cut", layers=1, logs=1, finished=False)
    assert states(tmp_path) == {"cut": "unknown", "old": "finished"}
    assert status.plain(status.runs([tmp_path / "notes"])).splitlines()[-1] == "no runs"
    with pytest.raises(UserError, match=r"file is no folder: give the folder of runs"):
        status.runs([tmp_path / "file"])


def test_a_runs_own_folder_shows_that_run_and_a_folder_given_twice_counts_once(tmp_path):
    tell(tmp_path / "r", "finished")
    assert states(tmp_path / "r") == {"r": "finished"}
    assert len(status.runs([tmp_path, tmp_path / "r" / ".."])) == 1


def test_what_goes_on_stands_first_and_what_is_done_last(tmp_path):
    for state in status_file.ENDED:
        tell(tmp_path / state, state)
    tell(tmp_path / "killed", "training")
    with running(tmp_path / "b"), running(tmp_path / "a", "evaluating") as (_, listen):
        listen()
        while len(states(tmp_path)) < 6 or "starting" in states(tmp_path).values():
            time.sleep(0.01)
        seen = status.runs([tmp_path])
    assert [run.name for run in seen] == ["a", "b", "killed", "failed", "preempted", "finished"]


def test_lines_are_never_cut_and_hold_what_they_should(tmp_path):
    name = "a-very-long-name-" + "x" * 180
    figures = {"images_per_s": 12345.6, "objective": 0.97531}
    tell(tmp_path / name, "preempted", Path("step_000000090.pt"), step=95, **figures)
    content = json.loads((tmp_path / name / status_file.NAME).read_text())
    now = status_file.when(content["updated"]) + timedelta(seconds=150)
    head, row = status.rows(status.runs([tmp_path]), now)
    assert dict(zip(head, row, strict=True)) == {
        "run": name, "state": "preempted", "step": "95/100", "epoch": "1.9", "images/s": "12,346",
        "objective": "0.9753", "checkpoint": "90", "restarts": "0", "ranks": "2",
        "host": os.uname().nodename, "told": "2 min ago",
    }  # fmt: skip
    assert name in status.plain(status.runs([tmp_path])).splitlines()[1]


def command(*arguments, **options):
    # Its packages are here already: a child that imports them anew takes seconds
    code = f"import sys; from syncbn.trainer.status import main; sys.exit(main({[*map(str, arguments)]!r}))"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **options)


def test_without_a_terminal_the_table_is_printed_once(tmp_path):
    tell(tmp_path / "r[bold]x", "finished")
    done = command(tmp_path, stdout=subprocess.PIPE, text=True)
    out, _ = done.communicate(timeout=300)
    assert done.returncode == 0
    assert "r[bold]x  finished" in out
    assert "\x1b" not in out


def test_on_a_terminal_the_table_lives_until_it_is_interrupted(tmp_path):
    tell(tmp_path / "r[bold]x", "preempted", step=11)
    ours, theirs = pty.openpty()
    live = command(
        tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "120"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what it runs behind
    )
    os.close(theirs)
    seen = b""
    try:
        while b"11/100" not in seen:
            seen += os.read(ours, 10_000)
        assert b"r[bold]x" in seen
        tell(tmp_path / "r[bold]x", "preempted", step=12)
        while b"12/100" not in seen:
            seen += os.read(ours, 10_000)
        live.send_signal(signal.SIGINT)
        while live.poll() is None:
            try:
                seen += os.read(ours, 10_000)
            except OSError:  # the other end is closed
                break
        assert live.wait(timeout=60) == 0
        assert b"Traceback" not in seen
    finally:
        live.kill()
        os.close(ours)


NAMES = ["plain", 'quo"te', "back\\slash", "line\nbreak", "\\n", "schön ✓", "x{y}=,#"]


def samples(text):
    """{metric: {(run, state): value}} as Prometheus' own reader has it."""
    from prometheus_client.parser import text_string_to_metric_families

    families = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge"
        assert family.documentation
        assert family.name not in families, "a metric's lines must stand together"
        families[family.name] = {(s.labels["run"], s.labels.get("state")): s.value for s in family.samples}
        assert len(families[family.name]) == len(family.samples)
    return families


def test_prometheus_reads_every_name_and_figure(tmp_path):
    for name in NAMES:
        tell(tmp_path / name, "finished", step=10)
    tell(tmp_path / "known", "failed", Path("step_000000050.pt"), step=60, images_per_s=5.5, objective=0.25)
    seen = samples(status.exposition(status.runs([tmp_path])))
    state = seen.pop("syncbn_run_state")
    assert {run for run, name in state if state[run, name]} == {*NAMES, "known"}
    assert sum(state.values()) == len(NAMES) + 1
    assert state["known", "failed"] == state['quo"te', "finished"] == 1
    assert {name.removeprefix("syncbn_run_") for name in seen} == set(status.METRICS)
    assert seen["syncbn_run_step"] == {**{(name, None): 10 for name in NAMES}, ("known", None): 60}
    # What is not known has no line, rather than a 0
    assert seen["syncbn_run_images_per_second"] == {("known", None): 5.5}
    assert seen["syncbn_run_checkpoint_step"] == {("known", None): 50}
    assert abs(seen["syncbn_run_updated_timestamp_seconds"]["known", None] - time.time()) < 60


def test_prometheus_has_its_own_words_for_what_is_not_finite(tmp_path):
    tell(tmp_path / "r", "finished")
    path = tmp_path / "r" / status_file.NAME
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "objective": math.nan, "images_per_s": -math.inf}))  # as another writer may
    text = status.exposition(status.runs([tmp_path]))
    assert 'run="r"} NaN\n' in text
    assert 'run="r"} -Inf\n' in text
    seen = samples(text)
    assert math.isnan(seen["syncbn_run_objective"]["r", None])


def test_a_name_that_is_no_text_is_exported_too(tmp_path):
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    (folder,) = tmp_path.iterdir()
    tell(folder, "finished")
    status.exposition(status.runs([tmp_path])).encode()
    status.plain(status.runs([tmp_path])).encode()


def test_the_file_for_prometheus_is_whole_at_every_moment(tmp_path, capsysbinary):
    tell(tmp_path / "runs" / "r", "finished")
    file = tmp_path / "syncbn.prom"
    assert status.main([str(tmp_path / "runs"), "--prometheus", str(file)]) == 0
    assert samples(file.read_text())["syncbn_run_step"] == {("r", None): 0}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["syncbn.prom"]
    assert status.main([str(tmp_path / "runs"), "--prometheus", "-"]) == 0
    assert capsysbinary.readouterr().out == file.read_bytes()


REFUSED = {
    "no-folder": ["/nowhere"],
    "no-room": ["{}", "--prometheus", "/nowhere/x.prom"],
}


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_one_line(tmp_path, capsys, arguments):
    assert status.main([word.format(tmp_path) for word in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "/nowhere" in line
