"""The first seconds of `python train.py`: a sign of life, what is not there told before ranks start, a clean Ctrl-C."""

import os
import pty
import signal
import subprocess
import time

import pytest

from tests.launch.jobs import PYTHON, ROOT, descendants, finished, job, running

LONG = ["run.name=r", "launch.nproc=2", "train.steps=100000", "wandb.mode=disabled"]


@pytest.mark.plain("0.2", "1.0", "3.0")
@pytest.mark.parametrize("after_s", [0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0])
def test_ctrl_c_ends_it_in_one_line(tmp_path, after_s):
    """A terminal sends SIGINT to the process group, whatever its processes are doing. What trains already, saves."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [*PYTHON, *LONG, f"run.root={tmp_path}"],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(after_s)
    everyone = descendants(started.pid)
    os.killpg(started.pid, signal.SIGINT)
    said, _ = started.communicate(timeout=25)  # a rank that does not hear it is killed after 30
    if started.returncode == 75:
        assert after_s > 3, "nothing trains so soon"
        assert said.splitlines()[-1].startswith("preempted at step ")
        assert "Traceback" not in said
    else:
        assert (started.returncode, said) == (130, "error: ended by SIGINT\n")
    assert not [pid for pid in everyone if running(pid)]


MISSING = {
    "folder": (["data=image_folder", "data.root=/nowhere"], "data.root=/nowhere has no folder 'train'"),
    "archive": (["data=cifar10", "data.root=/nowhere"], "data.root=/nowhere holds no CIFAR10 that can be r"),
    "imagenet": (["data=imagenet", "data.root=/nowhere"], "data.root=/nowhere holds no ImageNet (there is no such f"),
    "checkpoint": (["checkpoint=/nowhere/r"], "/nowhere/r cannot be read (No such file or directory): give a"),
    "weights": (["model.weights=/nowhere.pt"], "model.weights=/nowhere.pt: neither a file nor weights that t"),
}  # fmt: skip


@pytest.mark.plain("folder")
@pytest.mark.parametrize(("words", "said"), MISSING.values(), ids=MISSING)
def test_what_is_not_there_is_told_before_ranks_start(tmp_path, words, said):
    """Ranks could not: what they import is broken."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('broken by a test')")
    path = f"{tmp_path}:{ROOT}"
    code, output = finished(PYTHON, *words, "run.name=r", root=tmp_path / "runs", PYTHONPATH=path)
    assert code == 2
    assert output.splitlines()[-1].startswith(f"error: {said}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_refused_run_does_not_wait_for_what_ranks_import(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("import time; time.sleep(60)")
    with job(PYTHON, "data.root=/nowhere", "data=image_folder", root=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}") as ends:
        assert ends.wait(timeout_s=30) == 2


def first_sign(words):
    """What a terminal shows first, and after how many seconds; stdout is no terminal."""
    terminal, theirs = pty.openpty()
    began = time.monotonic()
    started = subprocess.Popen(
        [*PYTHON, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    shown = os.read(terminal, 1000).decode()
    while not shown.endswith("\n"):  # a terminal may hand a line over in pieces
        shown += os.read(terminal, 1000).decode()
    took_s = time.monotonic() - began
    stdout, _ = started.communicate(timeout=60)
    os.close(terminal)
    return shown, took_s, stdout


def test_a_terminal_shows_life_at_once_and_stdout_is_left_to_hydra():
    shown, took_s, stdout = first_sign(["--cfg", "job"])
    assert shown == "syncbn: starting, some seconds\r\n"
    assert took_s < 1.5  # torch alone takes longer to import
    assert "starting" not in stdout
    assert "batch_per_rank" in stdout


def test_without_a_terminal_it_says_nothing(tmp_path):
    done = subprocess.run([*PYTHON, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
