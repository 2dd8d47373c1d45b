"""What a GPU machine runs, `make gpu`: rehearsed here with what such a machine has, and its table of made figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, runner

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
    steps = gpu.read(tmp_path / "out" / "results.jsonl")
    assert [(name, step.outcome["code"]) for name, step in steps.items()] == [(name, 0) for name in STEPS]
    checks = {row["case"]["check"] for row in steps["smoke"].rows}
    assert checks == {"layer", "eager", "masked element", "images", "native", "every pass"}
    assert {row["case"]["layers"] for row in steps["step"].rows if "layer" in row["table"]} == {20}
    assert {row["figures"]["right"] for row in steps["op"].rows} == {"yes"}
    assert {row["case"]["level"] for row in steps["drift"].rows} == {"rank", "image"}


@NO_GPU
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2
    assert done.stderr == "There is no GPU here. The same steps run in small without one: make gpu ARGS=--rehearse\n"
    assert not (tmp_path / "out").exists()


def test_a_step_that_there_is_not_is_named(tmp_path):
    done = run(tmp_path, "--rehearse", "smoke", "stpe")
    assert done.returncode == 2
    assert done.stderr == "There is no step stpe: the steps are smoke tests step op drift graph\n"


@pytest.mark.ci
@pytest.mark.slow
@NO_GPU
def test_a_step_that_fails_stops_no_other_and_one_can_be_run_again_alone(tmp_path):
    failing = tmp_path / "python"
    failing.write_text(f'#!/bin/sh\ncase "$*" in *op_gpu*) exit 3;; esac\nexec {sys.executable} "$@"\n')
    failing.chmod(0o755)

    first = run(tmp_path, "--rehearse", "op", "graph", python=failing)
    again = run(tmp_path, "--rehearse", "op")

    assert first.returncode == 1
    assert "op      FAILED (3)" in first.stdout
    assert "graph   ok" in first.stdout
    assert again.returncode == 0, again.stdout
    assert "op      ok" in again.stdout
    assert "graph   ok" in again.stdout  # of the run before


def row(table, case, **figures):
    """A record with what the table reads of one; a number is the median of three."""
    spreads = {
        name.replace("_", " "): {"low": 0, "median": value, "high": 9, "n": 3} for name, value in figures.items()
    }
    return {"table": table, "case": case, "figures": spreads}


def op_row(mb, chain, torch_over_ours, of_copy):
    tensor = {"MB": mb, "chain": chain}
    ours = row("operator", {**tensor, "contestant": "syncbn"}, of_syncbn=1.0)
    ours["figures"]["of copy"] = of_copy
    return [ours, row("operator", {**tensor, "contestant": "torch"}, of_syncbn=torch_over_ours)]


def pass_rows(mb, share, narrow=False):
    names = ("moments", "images", "normalize", "grad_sums", "grad_input")
    cases = [{"MB": mb, "narrow": narrow, "pass": name} for name in names]
    return [{"table": "passes", "case": case, "figures": {"of copy": share}} for case in cases]


def step_row(name, of_local, torch_over_it, memory_mib, waits):
    made = row("step", {"images": 32, "contestant": name}, of_local=of_local, torch_over_it=torch_over_it)
    made["figures"] |= {"memory_mib": memory_mib, "kernels": 900, "waits": waits}
    return made


HOST = "host, tiny tensors"
MEASURED = {
    "smoke": [*pass_rows(400, 0.9), *pass_rows(400, 0.4, narrow=True), *pass_rows(1, 0.1)],
    # the last is one that a cache holds
    "op": [*op_row(2000, "BN", 1.9, 0.5), *op_row(2000, "BN+add+ReLU", 1.6, 0.5), *op_row(0.002, "BN+ReLU", 3.0, 9.0)],
    "step": [
        row(HOST, {"kind": "torch"}, of_torch=1.0),
        row(HOST, {"kind": "syncbn"}, of_torch=0.5),
        step_row("local", 1.0, 1.25, 90, 0),
        step_row("torch", 1.25, 1.0, 120, 53),
        step_row("syncbn", 1.05, 1.19, 100, 0),
        step_row("fused", 1.0, 1.25, 80, 0),
    ],
    "drift": [row("a model", {"level": "off"}, of_off=1.0), row("a model", {"level": "image"}, of_off=1.015)],
    "graph": [],
}
MACHINE = {
    "hardware": {"cpu": "a CPU", "cores": 2, "instructions": "AVX512", "gpu": "a GPU"},
    "versions": {"torch": "2"},
}


def ended(step, code=0, seconds=1, limit_s=50):
    figures = {"code": code, "seconds": seconds, "limit_s": limit_s}
    return {"benchmark": "gpu", "table": "steps", "case": {"step": step}, "figures": figures, **MACHINE}


def test_the_table_has_each_figure_where_it_was_measured(tmp_path, capsys):
    lines = [ended("op", 1)]  # what a later run replaces
    for step, rows in MEASURED.items():
        lines += [{"benchmark": step, **one, **MACHINE} for one in rows]
        lines.append(ended(step) if rows else ended(step, 124, 40, 40))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    runner.run("gpu", [str(tmp_path)])

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


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="`make gpu` makes it"):
        runner.run("gpu", [str(tmp_path)])
