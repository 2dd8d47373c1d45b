"""How a run that cannot go on ends: soon, and with a last line that says which rank, why, and what to do."""

import shutil
import signal
import subprocess
import time
from unittest.mock import patch

import pytest
from torch.distributed import DistBackendError

from syncbn.trainer.data.workers import no_shared_memory
from syncbn.trainer.errors import FAILED, USER_ERROR
from syncbn.trainer.job import ranks, start
from tests.launch.jobs import PYTHON, STANDALONE, finished

SHORT = ["run.name=r", "launch.nproc=2", "train.steps=2", "wandb.mode=disabled"]
TORCHRUN = [*STANDALONE, "train.py"]
ONE_CHANNEL = [*SHORT, "model.name=tests.launch.nets:of_one_channel"]
WRONG_CHANNELS = "expected input[4, 3, 8, 8] to have 1 channels, but got 3 channels instead"


@pytest.mark.plain("python")
@pytest.mark.parametrize("door", [PYTHON, TORCHRUN], ids=["python", "torchrun"])
def test_an_error_of_every_rank_has_one_traceback_and_ends_with_what_it_was(tmp_path, door):
    code, said = finished(door, *ONE_CHANNEL, root=tmp_path / "runs")
    assert code == 1
    assert said.count("Traceback (most recent call last)") == 1 + (door is TORCHRUN)  # of torchrun itself
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert line.startswith(("error: rank 0 failed: RuntimeError: ", "error: rank 1 failed: RuntimeError: "))
    assert line.endswith(f"{WRONG_CHANNELS}; the model was given images [4, 3, 8, 8]")
    assert door is TORCHRUN or said.splitlines()[-1] == line


def may_mount():
    return (
        shutil.which("unshare")
        and not subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True, check=False
        ).returncode
    )


@pytest.mark.parametrize("size", ["1m", "20k"])
@pytest.mark.plain("1m")
def test_workers_without_shared_memory_end_the_run_with_the_mend(tmp_path, size):
    if not may_mount():
        pytest.skip("this user may not mount a file system")
    small = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$0" "$@"']
    data = ["data=fake", "data.size=64", "data.batch_per_rank=64", "data.workers=4", "launch.timeout_s=300"]
    began = time.monotonic()
    code, said = finished([*small, *PYTHON], *SHORT, *data, root=tmp_path / "runs")
    assert code == USER_ERROR, said
    assert "has no room for the batches that workers send: data.workers=0" in said.splitlines()[-1]
    assert "--shm-size" in said
    assert "Traceback" not in said
    assert time.monotonic() - began < 90  # far from the timeout


KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM
BLAMED = {
    "the one that says why": ({0: FAILED, 1: USER_ERROR}, [], [], 1),
    "the one that was killed": ({0: FAILED, 1: KILLED}, [], [0], 1),
    "not one that was asked to end": ({0: FAILED, 1: TERMINATED, 2: KILLED}, [0], [], 2),
    "not one that the launcher killed": ({0: FAILED, 1: KILLED}, [], [1], 0),
    "not one that the launcher ended": ({0: TERMINATED, 1: FAILED}, [], [0], 1),
    "the one that told": ({0: FAILED, 1: FAILED}, [1], [], 1),
    "the one that told, even late": ({0: FAILED, 1: TERMINATED}, [1], [1], 1),
}


@pytest.mark.parametrize(("exit_codes", "reporting", "stopped", "blamed"), BLAMED.values(), ids=BLAMED)
def test_the_rank_that_the_others_fell_with_is_named(exit_codes, reporting, stopped, blamed):
    assert start.to_blame(exit_codes, reporting, stopped) == (blamed, exit_codes[blamed])


class Ended:
    """A process that was killed."""

    pid = 2**22 + 1  # no process has it

    def poll(self):
        return KILLED


@pytest.mark.parametrize("kernel", [True, False])
def test_memory_is_named_where_the_kernel_counted_a_kill_for_it(tmp_path, kernel):
    counter = tmp_path / "memory.events"
    counter.write_text("oom 3\noom_kill 3\n")

    def over(_):
        counter.write_text(f"oom 4\noom_kill {3 + kernel}\n")
        return True

    with patch.multiple(ranks, _start=lambda *_: Ended(), _over=over, _oom_counters=lambda: [counter]):
        ends = ranks.run_ranks("config", 2, [], forked=False)
    assert ends.out_of_memory == kernel
    assert ("data.batch_per_rank" in start.end_in_words(KILLED, ends.out_of_memory)) == kernel


def test_this_machine_counts_such_kills():
    assert any(path.exists() and "oom_kill " in path.read_text() for path in ranks._oom_counters())


def test_a_lost_rank_is_no_lack_of_shared_memory():
    """Both are told in those words."""
    lost = DistBackendError("rank 1 died or left in the middle of a message through shared memory")
    assert no_shared_memory(lost) is None
    assert no_shared_memory(RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")) is not None
