"""What surrounds a run, made for real: each row of docs/surroundings.md works, or ends in one line that says why."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.launch.jobs import PYTHON, ROOT, finished

SHORT = ["run.name=r", "launch.nproc=2", "train.steps=2"]
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd "$0" && exec "$@"'
NO_TEMPORARY = (
    'for f in /tmp /var/tmp /usr/tmp "$0"; do test ! -d $f || { mount --bind $f $f && mount -o remount,ro,bind $f; } '
    '|| exit; done; mount -t tmpfs tmpfs /mnt; cd "$0" && exec "$@" run.root=/mnt/runs'
)
# Another user reads what root's folders hold, as Python itself may lie there, but writes only what is everyone's
MAY_READ = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]

WORKS = {
    "no-HOME": ["env", "-u", "HOME"],
    "HOME-missing": ["env", "HOME=/proc/nowhere"],
    "TMPDIR-missing": ["env", "TMPDIR=/nowhere/tmp"],
    "TMPDIR-unwritable": ["env", "TMPDIR=/proc"],
    "LANG-C": ["env", "-u", "LC_ALL", "LANG=C"],
    "ascii": ["env", "LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0", "PYTHONIOENCODING=ascii"],
    "few-files": ["sh", "-c", 'ulimit -n 64; exec "$0" "$@"'],
    "left-over-numbers": ["env", "RANK=0", "WORLD_SIZE=8", "LOCAL_RANK=0"],
    "empty-environment": ["env", "-i", f"PATH={os.environ['PATH']}"],
    "no-user-name": ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", *MAY_READ, "env", "-u", "HOME"],
    "host-without-address": ["unshare", "--uts", "sh", "-c", 'hostname nowhere-known && exec "$0" "$@"'],
    "lo-alone": ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"'],
    "read-only-code": ["unshare", "--mount", "sh", "-c", READ_ONLY, str(ROOT)],
}
ENDS = {
    "no-network": (["unshare", "--net"], "ranks meet at 127.0.0.1, and nothing can connect there (Network is unrea"),
    "no-temporary-folder": (["unshare", "--mount", "sh", "-c", NO_TEMPORARY, str(ROOT)], "no folder for temporary"),
    "left-over-address": (["env", "-u", "MASTER_PORT", "RANK=1", "WORLD_SIZE=2", "MASTER_ADDR=127.0.0.1"], "rank 1"),
}  # fmt: skip


def skip_unless_possible(surrounding):
    made = [*surrounding[: surrounding.index("sh")], "true"] if "sh" in surrounding else [*surrounding, "true"]
    if shutil.which(made[0]) is None or subprocess.run(made, capture_output=True, check=False).returncode:
        pytest.skip(f"this user may not run {made[0]}, or there is none")


@pytest.fixture
def everyones():
    """A folder that every user may write in: pytest keeps its own from all but one."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.plain("no-user-name")
@pytest.mark.parametrize("surrounding", WORKS.values(), ids=WORKS)
def test_a_run_works(everyones, surrounding):
    skip_unless_possible(surrounding)
    root = everyones / "runs"
    code, said = finished([*surrounding, *PYTHON], *SHORT, root=root)
    assert code == 0, said
    assert (root / "r" / "result.json").exists()
    assert "Traceback" not in said
    assert "images on cpu | 2 steps" in said


@pytest.mark.plain("no-network", "left-over-address")
@pytest.mark.parametrize(("surrounding", "said"), ENDS.values(), ids=ENDS)
def test_a_run_ends_in_a_line_that_says_why(tmp_path, surrounding, said):
    skip_unless_possible(surrounding)
    code, output = finished([*surrounding, *PYTHON], *SHORT, root=tmp_path / "runs")
    (line,) = output.splitlines()
    assert code == 2
    assert line.startswith(f"error: {said}")


@pytest.mark.slow
def test_too_few_files_for_workers_are_told_with_the_mend(tmp_path):
    few = ["sh", "-c", 'ulimit -n 64; exec "$0" "$@"']
    code, said = finished([*few, *PYTHON], *SHORT, "data.workers=4", "wandb.mode=disabled", root=tmp_path / "runs")
    assert code == 2, said
    assert "error: a rank may open 64 files and needs more: ulimit -n 4096, or lower data.workers=4" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_rank_that_meets_nobody_says_how_it_came_to_wait():
    """As in a shell that has kept RANK and MASTER_ADDR from elsewhere."""
    left = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    command = ["timeout", "30", *PYTHON, *SHORT]
    waiting = subprocess.run(command, cwd=ROOT, env={**os.environ, **left}, capture_output=True, text=True, check=False)
    (line,) = waiting.stderr.splitlines()
    assert line.startswith("rank 0 of 2 meets the others at 127.0.0.1:29517, as RANK, WORLD_SIZE and MASTER_ADDR say")
    assert line.endswith("unset RANK")
