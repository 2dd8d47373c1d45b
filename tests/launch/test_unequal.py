"""Two nodes that should not work together, and one that lacks what the other has: real agents, hosts of two names."""

import os
import shutil
from contextlib import ExitStack

import pytest

from tests.launch.jobs import ENVIRONMENT, PYTHON, ROOT, TORCHRUN, finished, free_port, job
from tests.trainer.images import image_folder

needs_hosts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="another host's name is given by root, with unshare"
)
SHORT = ["run.name=r", "wandb.mode=disabled", "train.steps=2", "launch.device=cpu"]


def agents(root, places, *words):
    """What each of two nodes said, and whether any was left waiting; places: (folder, its own words) of each."""
    port = free_port()
    with ExitStack() as stack:
        started = []
        for host, (folder, own) in enumerate(places):
            agent = [
                *TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=r",
                f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={int(host == 0)}",
                f"--node-rank={host}", "--local-addr=127.0.0.1", "train.py", *SHORT, *words, *own,
            ]  # fmt: skip
            name = ["unshare", "--uts", "sh", "-c", f'hostname node{host}; exec "$@"', "sh"]
            environment = {**ENVIRONMENT, "PYTHONPATH": str(folder)}
            started.append(stack.enter_context(job([*name, *agent], root=root, cwd=folder, **environment)))
        codes = [agent.wait() for agent in started]
        assert codes == [1, 1], started[0].said  # torchrun's own, for any error
        assert [agent.left_over() for agent in started] == [{}, {}]
        return [line for agent in started for line in agent.said.splitlines() if line.startswith("error: ")]


def copied(folder):
    """Another node's files: the program in a folder of its own."""
    folder.mkdir()
    for name in "syncbn", "conf":
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    return folder


@needs_hosts
@pytest.mark.slow
def test_other_code_and_another_config_are_refused_and_named(tmp_path):
    there = copied(tmp_path / "there")
    for path in "syncbn/trainer/report/plots.py", "conf/norm/sync.yaml":
        (there / path).write_text((there / path).read_text() + "\n# changed\n")
    (line,) = agents(tmp_path / "runs", [(ROOT, ["seed=1"]), (there, ["seed=2", "train.ema=0.5"])])
    assert line.startswith("error: the ranks differ in syncbn's code: trainer/report/plots.py (")
    assert "conf/: norm/sync.yaml (" in line
    assert (
        "the command line: seed=1 on rank 0 of host node0, seed=2 train.ema=0.5 on rank 1 of host node1: "
        "give every node the same packages, code, conf/, command line and devices"
    ) in line
    assert "torch:" not in line
    assert not (tmp_path / "runs").exists()


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["mount", "image"])
def test_a_node_with_other_data_or_none_is_named(tmp_path, lacking):
    here, there = copied(tmp_path / "here"), copied(tmp_path / "there")
    for folder in here, there:
        image_folder(folder / "data", {"a": 8, "b": 8}, {"a": 2, "b": 1})
    if lacking == "mount":
        shutil.rmtree(there / "data")
    else:
        (there / "data" / "train" / "a" / "0003.jpg").unlink()
    (line,) = agents(tmp_path / "runs", [(here, []), (there, [])], "data=image_folder", "data.root=data")
    if lacking == "mount":
        assert line.startswith("error: data.root=data has no folder 'train'")
        assert line.endswith("(on rank 1 of host node1)")
    else:
        assert "the ranks differ in the data's train: 16 on rank 0 of host node0, 15 on rank 1 of host node1" in line
        assert line.endswith("give every node the same data")
    assert not [*(tmp_path / "runs").glob("*")]


@pytest.mark.slow
@pytest.mark.parametrize("door", [[*PYTHON, "launch.nproc=3"], [*TORCHRUN, "--nproc-per-node=3", "train.py"]])
def test_a_group_that_does_not_divide_the_ranks_is_refused_before_anything_is_built(tmp_path, door):
    (tmp_path / "empty" / "train").mkdir(parents=True)  # to read it would be refused
    command = ["data=image_folder", f"data.root={tmp_path / 'empty'}", "norm.group=2", *SHORT]
    code, said = finished(door, *command, root=tmp_path / "runs")
    assert code == (2 if PYTHON[1] in door[:2] else 1)
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "norm.group=2 does not divide the 3 ranks of this job" in line
    assert "norm.group= one of 1, 3, world, node" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_group_that_fits_trains(tmp_path):
    code, said = finished(PYTHON, *SHORT, "norm.group=2", "launch.nproc=4", root=tmp_path / "runs")
    assert code == 0, said
    assert "buffers diverged" not in said
    code, said = finished(PYTHON, "task=evaluate", f"checkpoint={tmp_path}/runs/r", "launch.nproc=3", root=tmp_path)
    assert code == 0, said
