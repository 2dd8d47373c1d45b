"""W&B for real, a wandb-core and all, and what may happen to it: training waits for none of it."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from syncbn.trainer.errors import UserError
from syncbn.trainer.tracking import WAITING, Tracker, WandbConfig
from tests.trainer.tracked import FIGURES, STEPS

ROOT = Path(__file__).parents[2]
WANDB = Path(sys.executable).parent / "wandb"
TRACK = [sys.executable, "-m", "tests.trainer.tracked"]
SECRETS = {"WANDB_API_KEY": 8 * "plant", "A_TOKEN": "planted-in-the-environment"}
TIMEOUT_S = 6.0  # a wandb-core takes about one to start, on two busy cores more
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
        self.exit_s = ended_at - self.left_at
        self.files = Path(self.files)

    def waited_for_nothing(self):
        return self.slowest_s < BLOCKED_S and self.finish_s < TIMEOUT_S + BLOCKED_S and self.exit_s < EXIT_S


def read(files):
    (file,) = files.glob("*.wandb")
    inspect = [WANDB, "leet", "inspect", "--json", file]
    return [json.loads(line) for line in subprocess.check_output(inspect, text=True).splitlines()]


def is_whole(files):
    """Every figure of every step, the table and the summary: nothing that was put onto the queue is missing."""
    records = read(files)
    lines = [r["history"]["item"] for r in records if r["type"] == "history" and "train/0" in r["history"]["item"]]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line[f"train/{i}"] == line["step"] for line in lines for i in range(FIGURES))
    text = json.dumps(records)
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
    return Tracked(tmp_path_factory.mktemp("run"), run_id="0123abcd")


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
