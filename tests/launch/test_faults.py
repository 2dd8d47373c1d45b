"""Faults in real jobs: ranks that die or hang, disks that fill, memory that runs out, secrets that must not show."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from syncbn.trainer import status
from syncbn.trainer.runs import status_file
from tests.launch.jobs import PYTHON, STANDALONE, differing, figures, finished, job, state
from tests.trainer.images import image_folder

SHORT = ["run.name=r", "launch.nproc=2", "train.steps=20", "train.log_every=4", "train.eval_every=15"]
SHORT += ["checkpoint.every=4", "wandb.mode=disabled"]
DEADLY = [*SHORT, "model.name=tests.launch.nets:Fatal", "launch.max_restarts=1"]


@pytest.fixture(scope="module")
def undying(tmp_path_factory):
    root = tmp_path_factory.mktemp("undying")
    code, said = finished(PYTHON, *DEADLY, root=root, SYNCBN_TEST_DEATH="never:9:/nowhere")
    assert code == 0, said
    return root / "r"


@pytest.mark.parametrize(
    ("place", "rank"),
    [
        pytest.param("backward", 1, marks=pytest.mark.ci),
        ("save", 0),
        ("eval", 1),
    ],
)
@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_again_with_the_others(undying, tmp_path, place, rank):
    root = tmp_path / "runs"
    death = f"{place}:{rank}:{tmp_path / 'died'}"
    with job(PYTHON, *DEADLY, root=root, SYNCBN_TEST_DEATH=death) as dying:
        assert dying.wait() == 0, dying.said
        assert dying.left_over() == {}
        assert (tmp_path / "died").exists()
        assert f"rank {rank} was ended by SIGKILL" in dying.said
        assert "restart 1 of 1" in dying.said
        assert re.search(r"going on from step (8|12)$", dying.said, re.M)
        assert "Traceback" not in dying.said
    assert differing(state(root / "r"), state(undying)) == []
    assert figures(root / "r") == figures(undying)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_without_restarts_the_job_says_who_died(tmp_path, rank):
    death = f"step:{rank}:{tmp_path / 'died'}"
    code, said = finished(PYTHON, *DEADLY, "launch.max_restarts=0", root=tmp_path / "runs", SYNCBN_TEST_DEATH=death)
    assert code == 1
    (line,) = re.findall(r"^error: (.*)", said, re.M)
    assert line.startswith(f"rank {rank} was ended by SIGKILL")
    (lost,) = re.findall(rf"^rank {1 - rank} lost another: (.*)", said, re.M)
    assert "Traceback" not in said
    record = status_file.read_status(tmp_path / "runs" / "r" / status_file.NAME)
    assert (record.state, record.error) == ("failed", f"{line} (rank 0: {lost})" if rank else line)


@pytest.mark.parametrize("door", [PYTHON, pytest.param([*STANDALONE, "train.py"], marks=pytest.mark.slow)])
def test_what_one_rank_fails_with_is_the_cause_everywhere(tmp_path, door):
    """Seen with a broken JPEG: the screen named it, status.json said "Connection closed by peer"."""
    data = image_folder(tmp_path / "data", {"a": 20, "b": 20}, {"a": 2, "b": 2}, size=32)
    (data / "train" / "b" / "0007.jpg").write_bytes(b"")
    options = ["data=image_folder", f"data.root={data}", *SHORT, "seed=2"]  # with which it is rank 1's
    code, said = finished(door, *options, root=tmp_path / "runs")
    assert code == (2 if door is PYTHON else 1)
    (cause,) = re.findall(rf"^error: (cannot read {data}/train/b/0007.jpg .*)", said, re.M)
    assert f"rank 0 lost another: {cause}\n" in said
    record = status_file.read_status(tmp_path / "runs" / "r" / status_file.NAME)
    assert (record.state, record.error) == ("failed", cause)
    assert f"r: {cause}" in status.plain(status.runs([tmp_path / "runs"])).splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.ci), 0])
def test_a_rank_that_hangs_is_named_with_the_layer_that_it_never_reached(tmp_path, rank):
    hanging = [*SHORT, "model.name=tests.launch.nets:Held", "launch.timeout_s=16", "launch.max_restarts=1"]
    (hold := tmp_path / "hold").write_text("0.3")
    with job(PYTHON, *hanging, root=tmp_path / "runs", SYNCBN_TEST_HOLD=str(hold)) as hung:
        hung.until_saved(12)  # by then it has told of its messages, which it does every 2 s
        began = time.monotonic()
        os.kill(hung.ranks[rank], signal.SIGSTOP)
        hold.unlink()
        hung.until(lambda: " lost another: " in hung.said)
        assert time.monotonic() - began < 16 + 20  # some seconds of a loaded machine
        hung.until(lambda: "restart 1 of 1" in hung.said)  # torch gives a stopped rank 30 s before it kills it
        assert hung.wait() == 0, hung.said
        assert hung.left_over() == {}
    message = re.search(r"lost another: (.*)", hung.said)[1]
    if rank == 1:
        assert re.search(r"this rank \(0\) waits in message \d+, [\w.]*bn\d \((for|back)ward\)", message), message
        assert re.search(r"rank 1, last heard of \d+ s ago, had made \d+ messages, the last in [\w.]*bn\d", message), (
            message
        )
    else:  # it hosts the store through which ranks hear of each other
        assert "rank 0" in message


@pytest.mark.slow
def test_out_of_memory_is_told_with_the_mend(tmp_path):
    code, said = finished(PYTHON, *SHORT, "model.name=tests.launch.nets:Greedy", "drift.level=off", root=tmp_path)
    assert code == 2
    assert "error: rank 1 has no memory left (tried to allocate" in said
    assert "lower data.batch_per_rank=4" in said
    assert "Traceback" not in said


class Disk:
    """A disk of its own at a folder. Only root may have one."""

    def __init__(self, folder):
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("mkfs.ext4 not found")
        self.folder, self.image, self.filling = folder, folder.with_name("disk.img"), None
        with self.image.open("wb") as image:
            image.truncate(60_000_000)
        subprocess.run(["mkfs.ext4", "-q", self.image], check=True)
        self.mount()

    def mount(self):
        how = ["mount", "-o", "loop,errors=remount-ro", self.image, self.folder]
        if subprocess.run(how, check=False).returncode:
            pytest.skip("this user may not mount a file system")

    def fill(self):
        """Leave no room, of what the job gives back by itself either, until it is unmounted."""
        fill = 'cat /dev/zero >> "$0" 2> /dev/null'
        subprocess.run(["sh", "-c", fill, self.folder / "filler"], check=False)
        again = f"while sleep 0.02; do {fill}; done"
        self.filling = subprocess.Popen(["sh", "-c", again, self.folder / "filler"])

    def fail(self):
        """Have the kernel find an error on it: nothing can be written from here on, to open files neither."""
        which = ["findmnt", "--noheadings", "--output=SOURCE", self.folder]
        device = Path(subprocess.run(which, check=True, capture_output=True, text=True).stdout.strip()).name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("a test")

    def mend(self):
        """Go on with a copy: whatever has mounts of its own, a container, may hold the disk that failed as it is."""
        subprocess.run(["sync", "-f", self.folder], check=False)  # nothing of it may have been lost by unmounting alone
        self.umount()
        self.image = shutil.copy(self.image, self.image.with_name("mended.img"))
        self.mount()
        (self.folder / "filler").unlink(missing_ok=True)

    def umount(self):
        if self.filling:
            self.filling.kill()
            self.filling.wait()
        subprocess.run(["umount", "-l", self.folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [pytest.param("full", marks=pytest.mark.ci), "read-only"])
def test_a_disk_that_fails_costs_files_and_no_training(tmp_path, fault):
    root = tmp_path / "disk" / "runs"  # what the job says goes beside the disk
    root.mkdir(parents=True)
    disk = Disk(root)
    try:
        with job(PYTHON, *SHORT, "train.steps=60", root=root) as failing:
            failing.until_saved(8)
            whole = [line["train/loss"] for line in figures(root / "r")[:2]]
            {"full": disk.fill, "read-only": disk.fail}[fault]()
            code = failing.wait()
            said = failing.said
        assert code == 3, said
        assert "step     60" in said  # it trained to the end
        assert "training goes on" in said
        (line,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert "lacks what could not be written (" in line
        disk.mend()
        assert not (root / "r" / "result.json").exists()  # though there may have been room for that
        written = (root / "r" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["train/loss"] for line in written[:2]] == whole  # nothing that was written is harmed
        assert state(root / "r")["step"] >= 8

        code, said = finished(PYTHON, *SHORT, "train.steps=60", root=root)
        assert code == 0, said
        assert (root / "r" / "result.json").exists()
        assert {line["step"] for line in figures(root / "r")} == {*range(4, 61, 4), 15, 30, 45}
    finally:
        disk.umount()


@pytest.mark.slow
def test_no_secret_is_written_anywhere(tmp_path):
    """Into no file of the run, a checkpoint or W&B's own, nor onto the screen."""
    secret = "planted0secret1value"
    options = [
        *SHORT,
        "train.steps=4",
        "wandb.mode=offline",
        f"wandb.tags=['https://me:{secret}@host/?token={secret}']",
    ]
    code, said = finished(PYTHON, *options, root=tmp_path / "runs", WANDB_API_KEY=secret, HF_TOKEN=secret)
    assert code == 0, said
    broken = [*options, f"model.weights='https://me:{secret}@host/x?token={secret}'", "run.name=b"]
    code, refused = finished(PYTHON, *broken, root=tmp_path / "runs", WANDB_API_KEY=secret)
    assert code == 2
    assert secret not in said + refused
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"config.yaml", "rank0.log", "report.html", "latest"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    holding = [path.name for path in files if secret.encode() in path.read_bytes()]
    assert holding == []
