"""W&B for real, a wandb-core and all, and what may happen to it: training waits for none of it."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from syncbn.trainer.display import wandb_run
from syncbn.trainer.display.wandb_run import WAITING, Tracker, WandbConfig
from syncbn.trainer.errors import UserError
from tests.trainer.display.wandb_files import WANDB, read
from tests.trainer.tracked import FIGURES, PICTURED, STEPS

ROOT = Path(__file__).parents[3]
TRACK = [sys.executable, "-m", "tests.trainer.tracked"]
SECRETS = {"WANDB_API_KEY": 8 * "plant", "A_TOKEN": "planted-in-the-environment"}
TIMEOUT_S = 6.0  # a wandb-core takes about one to start, on two busy cores more
PATIENT_S = 30.0  # where nothing happens to it: half of TIMEOUT_S was too short for its end beside other tests
BLOCKED_S = 0.5  # a call that puts onto a queue takes 0.1 ms, but on a busy machine others have the core or the GIL
EXIT_S = 10  # a Python that has imported torch, on a busy machine; wandb's telemetry alone would add 20


class Tracked:
    """What a process that tracked a run saw of it, and what it left behind."""

    def __init__(self, folder, what="none", run_id="", *, mode="offline", server=None, timeout_s=TIMEOUT_S):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | SECRETS
        if server:
            environment["WANDB_BASE_URL"] = f"http://127.0.0.1:{server}"
        config = json.dumps({"mode": mode, "timeout_s": timeout_s})
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            # Not pipes: a child that a killed wandb-core leaves behind would hold them open for some seconds more
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "tests.trainer.tracked",
                    folder,
                    config,
                    what,
                    run_id,
                    "--token=planted-argument",
                ],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=120,
                check=False,
            )
            ended_at = time.time()
            out.seek(0)
            err.seek(0)
            self.stderr = err.read()
            assert done.returncode == 0, self.stderr
            self.__dict__ |= json.loads(out.read().splitlines()[-1])
        self.timeout_s, self.exit_s = timeout_s, ended_at - self.left_at
        self.files = Path(self.files)

    def waited_for_nothing(self):
        return self.slowest_s < BLOCKED_S and self.finish_s < self.timeout_s + BLOCKED_S and self.exit_s < EXIT_S


# Of tests.trainer.tracked, in whole pixels of the picture, whatever the canvas that it lies on
LABELS = {"0": "dog", "1": "ant", "2": "cat"}
BOXES = [
    {
        "position": {"minX": 0, "maxX": 2, "minY": 0, "maxY": 2},
        "domain": "pixel",
        "class_id": 2,
        "box_caption": "cat 50%",
        "scores": {"score": 0.5},
    },
    {
        "position": {"minX": 0, "maxX": 1, "minY": 0, "maxY": 1},
        "domain": "pixel",
        "class_id": 1,
        "box_caption": "ant",
    },
]


def boxes_of(files, line):
    """Of each picture of a line of the history, the boxes and the class names by what they are."""

    def content(file):
        boxes = json.loads((files / "files" / file["path"]).read_text())
        return boxes["box_data"], boxes["class_labels"]

    every = line["eval/pictures.all_boxes"]
    return [each and {name: content(file) for name, file in each.items()} for each in every]


def is_whole(files):
    """Every figure of every step, the table and the summary: nothing that was put onto the queue is missing."""
    records = read(files)
    lines = [r["history"]["item"] for r in records if r["type"] == "history" and "train/0" in r["history"]["item"]]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line[f"train/{i}"] == line["step"] for line in lines for i in range(FIGURES))
    text = json.dumps(records)
    last = [line for line in lines if "eval/pictures.captions" in line][-1]
    assert (last["step"], last["eval/pictures.captions"]) == (PICTURED[-1], [f"a · b: after {PICTURED[-1]}", ""])
    pictures = [Image.open(files / "files" / name) for name in last["eval/pictures.filenames"]]
    assert [picture.size for picture in pictures] == [(4, 4), (4, 4)]
    assert boxes_of(files, last) == [None, {"truth": ([], LABELS), "prediction": (BOXES, LABELS)}]
    chart = Image.open(files / "files" / last["eval/chart.path"])
    assert {picture.getpixel((0, 0)) for picture in [*pictures, chart]} == {(PICTURED[-1],) * 3}
    return '"table"' in text and "verdict" in text and any(r["type"] == "exit" for r in records)


@contextmanager
def silent_server():
    """The port of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    return Tracked(tmp_path_factory.mktemp("run"), run_id="0123abcd", timeout_s=PATIENT_S)


def test_an_offline_run_is_whole(offline):
    assert offline.waited_for_nothing(), (offline.slowest_s, offline.finish_s, offline.exit_s, offline.stderr)
    assert offline.failure is None
    assert "W&B" not in offline.stderr
    assert is_whole(offline.files)


def test_no_secret_of_command_line_or_environment_is_written(offline):
    written = [path for path in offline.files.parent.rglob("*") if path.is_file()]
    assert [path for path in written if b"plant" in path.read_bytes()] == []
    assert any(path.suffix == ".wandb" for path in written)


HAPPENINGS = {
    "killed": ("SIGKILL", "offline", "Connection|BrokenPipe|Handle|Mailbox"),
    "stopped": ("SIGSTOP", "offline", r"no answer for \d"),
    "stopped-at-the-end": ("SIGSTOP-at-the-end", "offline", r"no answer for \d"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("what", "mode", "reason"), HAPPENINGS.values(), ids=HAPPENINGS)
def test_a_wandb_core_that_dies_or_hangs_is_replaced(tmp_path, what, mode, reason):
    seen = Tracked(tmp_path, what, mode=mode)
    assert seen.waited_for_nothing(), (seen.slowest_s, seen.finish_s, seen.exit_s, seen.stderr)
    assert seen.failure is None
    assert re.search(rf"W&B failed \(.*({reason}).*; the run goes on offline, with all its figures, in", seen.stderr)
    assert str(seen.files) in seen.stderr
    assert seen.stderr.count("W&B failed") == 1
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    assert is_whole(seen.files)


@pytest.mark.slow
@pytest.mark.parametrize("server", ["closed", "silent", "none"])
def test_online_without_a_server_goes_on_offline(tmp_path, server):
    with silent_server() as silent:
        port = {"closed": closed_port(), "silent": silent, "none": None}[server]
        seen = Tracked(tmp_path, mode="online", server=port)
    assert seen.waited_for_nothing(), (seen.slowest_s, seen.finish_s, seen.exit_s, seen.stderr)
    assert seen.failure is None
    assert seen.stderr.count("W&B failed") == 1
    assert seen.files.name.startswith("offline-run-")
    assert is_whole(seen.files)


@pytest.mark.slow
def test_what_fails_again_and_again_is_left_out_and_says_so(tmp_path):
    seen = Tracked(tmp_path, timeout_s=0.1)  # too short for a wandb-core to start
    assert seen.waited_for_nothing(), (seen.slowest_s, seen.finish_s, seen.exit_s, seen.stderr)
    assert seen.failure in seen.stderr
    assert seen.stderr.count("is left out from here on") == 1
    assert "metrics.jsonl has every figure" in seen.stderr


def test_a_run_goes_on_under_the_id_that_is_handed_over(offline):
    assert offline.run_id == "0123abcd"
    (run,) = [r["run"] for r in read(offline.files) if r["type"] == "run"]
    assert (run["run_id"], run["resume"]) == ("0123abcd", True)


@pytest.mark.ci
@pytest.mark.slow
def test_the_newest_folder_of_a_run_that_goes_on_is_whole_and_alone_is_sent(offline):
    folders = offline.files.parent
    then = Tracked(folders.parent, "gone-on", run_id="0123abcd", timeout_s=PATIENT_S)
    assert is_whole(then.files)
    paths = list(folders.glob("offline-run-*"))
    assert len(paths) == 2
    sync = [WANDB, "sync", "--dry-run", *paths]
    listed = subprocess.run(sync, cwd=folders, capture_output=True, text=True, check=True).stderr
    assert "Would sync 1 run(s)" in listed
    assert then.files.name in listed


class TakesAll:
    """A W&B run that notes what it is told, and is in order."""

    def __init__(self, folder, mode):
        name = "offline-run" if mode == "offline" else "run"
        self.settings = SimpleNamespace(sync_dir=folder / "wandb" / f"{name}-{time.monotonic_ns()}-abc")
        self.settings.sync_dir.mkdir(parents=True)
        (self.settings.sync_dir / "run-abc.wandb").touch()
        self.steps, self.summary, self.finished = [], {}, False

    def log(self, figures, step):
        self.steps.append(step)

    def status(self):
        pass

    def finish(self, exit_code):
        self.finished = True


@pytest.fixture
def begin(monkeypatch):
    """Begin a Tracker whose W&B is none, and whose server may be away."""
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(teardown=lambda: None))

    def begin(folder, *, mode="offline", server=True, earlier=(), timeout_s=TIMEOUT_S):
        def one_run(config, folder, mode, **_):
            if mode == "online" and not server:
                raise OSError("no server")
            return TakesAll(folder, mode)

        monkeypatch.setattr(wandb_run, "_begin", one_run)
        config = WandbConfig(mode=mode, timeout_s=timeout_s)
        logged = [(step, {"x": 1.0}) for step in earlier]
        return Tracker(config, folder, name="", group="", settings={}, run_id="abc", earlier=logged)

    return begin


def logged(tracker, steps):
    """The steps that W&B's last run was told, once these are logged too."""
    for step in steps:
        tracker.log(step, {"x": 1.0})
    tracker.finish()
    assert tracker.failure is None
    return tracker.run.steps


# How two processes track a run, and whether what the second leaves has to hold what the first logged
PROCESSES = {
    "offline": ({}, {}, True),
    "online": ({"mode": "online"}, {"mode": "online"}, False),
    "online-and-then-without-a-server": ({"mode": "online"}, {"mode": "online", "server": False}, False),
    "online-and-never-a-server": ({"mode": "online", "server": False}, {"mode": "online", "server": False}, True),
    "online-and-then-offline": ({"mode": "online"}, {}, False),
    "disabled-and-then-offline": ({"mode": "disabled"}, {}, True),
}


@pytest.mark.parametrize("first, second, whole", PROCESSES.values(), ids=PROCESSES)
def test_a_run_that_goes_on_logs_again_what_no_server_has(tmp_path, begin, first, second, whole):
    tracker = begin(tmp_path, **first)
    if first != {"mode": "disabled"}:
        logged(tracker, [1, 2, 3])
    assert logged(begin(tmp_path, **second, earlier=[1, 2]), [3, 4]) == ([1, 2, 3, 4] if whole else [3, 4])


def test_what_was_sent_in_between_is_not_logged_again(tmp_path, begin):
    logged(begin(tmp_path), [1, 2])
    for file in tmp_path.glob("wandb/*/*.wandb"):
        file.with_suffix(".wandb.synced").touch()  # as wandb sync does
    assert logged(begin(tmp_path, earlier=[1, 2]), [3, 4]) == [3, 4]


def test_no_silence_is_counted_while_nothing_is_asked(tmp_path, begin):
    """Seen with train.log_every=400 wandb.timeout_s=8: given up for "no answer for 47.8 s" at the first log."""
    tracker = begin(tmp_path, timeout_s=0.5)
    time.sleep(1.5)
    assert logged(tracker, [400]) == [400]
    assert len(list(tmp_path.glob("wandb/*"))) == 1


def test_the_command_that_sends_the_rest_can_be_pasted(tmp_path, begin, caplog, monkeypatch):
    def finish(run, exit_code):
        raise TimeoutError

    monkeypatch.setattr(TakesAll, "finish", finish)
    tracker = begin(tmp_path / "a {b} $c")
    tracker.finish()
    (command,) = re.findall(r"(wandb sync .*) sends the rest", caplog.text)
    assert shlex.split(command) == ["wandb", "sync", str(tracker.files)]


def test_disabled_it_does_nothing_and_keeps_the_id(tmp_path):
    tracker = Tracker(WandbConfig(mode="disabled"), tmp_path, name="", group="", settings={}, run_id="abc")
    for step in range(2 * WAITING):
        tracker.log(step, {"x": 1.0})
    tracker.finish()
    assert (tracker.failure, tracker.files, tracker.run_id) == (None, None, "abc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_timeout_that_is_none_is_refused(timeout_s):
    with pytest.raises(UserError, match=r"wandb.timeout_s=.*: must be positive and finite"):
        WandbConfig(timeout_s=timeout_s)
