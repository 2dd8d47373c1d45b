"""What a GPU machine runs, `make gpu`: rehearsed here with what such a machine has, and its table of made figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import tables

SCRIPT = Path("benchmarks/gpu.sh")
# Of the trainer's and tests' packages a GPU machine has none
MISSING = ("hydra", "omegaconf", "wandb", "rich", "matplotlib", "jinja2", "scipy", "keras")
WITHOUT = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""
STEPS = ["smoke", "tests", "step", "op", "drift", "graph"]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def run(tmp_path, *words, python=sys.executable):
    """gpu.sh in a process that can import none of what is missing there."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHON": str(python), "OUT": str(tmp_path / "out")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # Hydra comes with one
    return subprocess.run([SCRIPT, *words], env=environment, capture_output=True, text=True)


@pytest.mark.ci
@pytest.mark.slow
def test_the_rehearsal_goes_through_every_step_without_the_trainers_packages(tmp_path):
    done = run(tmp_path, "--rehearse")

    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 60
    assert [line.split(":")[0] for line in lines[: len(STEPS)]] == STEPS
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.jsonl", *(f"{name}.log" for name in STEPS)}
    found = tables.read(tmp_path / "out")
    assert [(line["step"], line["code"]) for line in found.values()] == [(name, 0) for name in STEPS]
    assert found["smoke"]["found"]["checks"].keys() == {"layer", "eager", "masked element", "images", "native"}
    assert found["step"]["found"]["layers"]["count"] == 20
    assert not any(line["wrong"] for line in found["op"]["found"]["rows"])
    assert found["drift"]["found"]["shares"].keys() == {"rank", "image"}


@NO_GPU
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2
    assert done.stderr == "There is no GPU here. The same steps run in small without one: make gpu ARGS=--rehearse\n"
    assert not (tmp_path / "out").exists()


def test_a_step_that_there_is_not_is_told(tmp_path):
    done = run(tmp_path, "--rehearse", "smoke", "stpe")
    assert done.returncode == 2
    assert done.stderr == "There is no step stpe: the steps are smoke tests step op drift graph\n"


@pytest.mark.ci
@pytest.mark.slow
@NO_GPU
def test_a_step_that_fails_stops_no_other_and_one_can_be_run_again_alone(tmp_path):
    failing = tmp_path / "python"
    failing.write_text(f'#!/bin/sh\ncase "$*" in *benchmarks.op_gpu*) exit 3;; esac\nexec {sys.executable} "$@"\n')
    failing.chmod(0o755)

    first = run(tmp_path, "--rehearse", "op", "graph", python=failing)
    again = run(tmp_path, "--rehearse", "op")

    assert first.returncode == 1
    assert "op      FAILED (3)" in first.stdout
    assert "graph   ok" in first.stdout
    assert again.returncode == 0, again.stdout
    assert "op      ok" in again.stdout
    assert "graph   ok" in again.stdout  # of the run before


def op_row(shape, chain, torch_ms, ours_ms):
    ms = {"torch": [torch_ms] * 3, "syncbn": [ours_ms] * 3}
    return {"shape": shape, "dtype": "torch.bfloat16", "chain": chain, "ms": ms, "copy_gb_per_s": 4000.0}


def pass_row(mb, share, narrow=False):
    of_copy = dict.fromkeys(("moments", "images", "normalize", "grad_sums", "grad_input"), share)
    return {"mb": mb, "of_copy": of_copy, "narrow": narrow}


def step_row(ms, memory, waits):
    return {"ms": [ms] * 3, "memory_mib": memory, "kernels": 900, "waits": waits}


FOUND = {
    "smoke": {"machine": "a GPU", "rows": [pass_row(400, 0.9), pass_row(400, 0.4, narrow=True), pass_row(1, 0.1)]},
    "op": {
        # 2 GB in 8 and 10 passes, at 4 TB/s in 4 and 5 ms; and one that a cache holds
        "rows": [
            op_row([1000, 100, 100, 100], "BN", 15.0, 8.0),
            op_row([1000, 100, 100, 100], "BN+add+ReLU", 16.0, 10.0),
            op_row([1, 10, 10, 10], "BN+ReLU", 3.0, 1.0),
        ]
    },
    "step": {
        "steps": {
            "32": {
                "local": step_row(20.0, 90, 0),
                "torch": step_row(25.0, 120, 53),
                "syncbn": step_row(21.0, 100, 0),
                "fused": step_row(20.0, 80, 0),
            }
        },
        "layers": {"ms_of_all": {"host": {"torch": [4.0] * 3, "syncbn": [2.0] * 3}}},
    },
    "drift": {"ratios": {"off": [1, 1, 1], "image": [1.01, 1.015, 1.02]}},
}


def test_the_table_tells_each_figure_where_it_was_measured(tmp_path, capsys):
    lines = [{"step": "op", "code": 1, "seconds": 1, "limit_s": 50, "found": None}]  # what a later line replaces
    lines += [{"step": s, "code": 0, "seconds": 1, "limit_s": 50, "found": found} for s, found in FOUND.items()]
    lines += [{"step": "graph", "code": 124, "seconds": 40, "limit_s": 40, "found": None}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    tables.main([str(tmp_path)])

    printed = capsys.readouterr().out
    cells = {row.split("|")[2].strip(): row.split("|")[4].strip() for row in printed.splitlines() if "|" in row}
    assert cells["moments, tensors > 60 MB: share of a copy's bandwidth"] == "0.90"
    assert cells["the same where C or S is not divisible by 8"] == "0.40 to 0.40 (n = 4)"
    both = "forward + backward, tensors > 60 MB: share of a copy's bandwidth on 8, 8, 10 passes"
    assert cells[both] == "0.50 to 0.50 (n = 2)"
    assert cells["torch.nn.SyncBatchNorm + ReLU, and + add + ReLU, over ours"] == "1.60 to 3.00 (n = 2)"
    assert cells["host time of a layer, tiny tensors, of torch.nn.SyncBatchNorm's"] == "0.50"
    assert cells["a layer at 8 images, eager, of torch.nn.SyncBatchNorm's time"] == "not yet measured"
    assert cells["host waits in a step"] == "syncbn 0, fused 0"
    assert cells["32 images: step of local batch norm, with fusion or as a graph"] == "fused 1.000"
    assert cells["32 images: step of torch.nn.SyncBatchNorm over ours"] == "syncbn 1.190, fused 1.250"
    assert cells["32 images: peak memory, MiB"] == "torch 120, syncbn 100, fused 80"
    assert cells["a step of ResNet-50 with drift at level image, of one without"] == "1.015"
    assert "graph   OUT OF TIME     40 s of  40 s" in printed
    assert "a GPU" in printed


def test_a_folder_without_results_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tables.main([str(tmp_path)])
    assert "`make gpu` makes it" in capsys.readouterr().err
