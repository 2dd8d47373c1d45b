"""The runner: it lists, refuses what it does not have, and keeps a record that the table maker reads."""

import json
import subprocess
import sys

import pytest

from benchmarks import runner
from benchmarks.measure import records, tables
from benchmarks.measure.records import Mean, Result, Spread


def run(*words):
    return subprocess.run([sys.executable, "-m", "benchmarks", *words], capture_output=True, text=True)


def test_without_a_name_it_lists_every_benchmark_with_a_line():
    listed = run().stdout
    for name, (_, line, *_) in runner.NAMES.items():
        assert f"    {name} " in listed
        assert line in listed


def test_an_unknown_name_is_one_line_with_the_near_one():
    done = run("drift_kost")
    assert done.returncode == 2
    assert done.stderr == "There is no benchmark drift_kost: did you mean drift_cost?\n"
    assert run("xyz").stderr == "There is no benchmark xyz: `python -m benchmarks` lists them\n"


@pytest.mark.parametrize("name", runner.NAMES)
def test_every_name_is_a_module_with_options(name):
    module = runner.loaded(name)
    with pytest.raises(SystemExit, match="0"):
        runner.parsed(name, module, ["--help"])


def test_a_benchmark_whose_package_is_missing_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    monkeypatch.delitem(sys.modules, "benchmarks.trainer.loops", raising=False)
    with pytest.raises(SystemExit, match="The benchmark trainer needs the package omegaconf, which is not installed"):
        runner.loaded("trainer")


def test_listing_imports_neither_torch_nor_a_benchmark():
    code = "import sys; from benchmarks.runner import main; main([]); print({'torch', 'triton'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


@pytest.mark.parametrize("name", ["message"])
def test_a_quick_benchmark_leaves_records_that_the_table_maker_reads(name, tmp_path):
    file = tmp_path / "records.jsonl"

    done = run(name, "2", "--values", "9", "--turns", "3", "--json", str(file))

    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["case"] for row in rows] == [{"ranks": 2, "way": way} for way in ("memory", "gloo")]
    for row in rows:
        assert (row["benchmark"], row["parameters"]["values"], row["figures"]["us"]["n"]) == ("message", 9, 3)
        us = row["figures"]["us"]
        assert 0 < us["low"] <= us["median"] <= us["high"]
        assert row["hardware"].keys() == {"cpu", "cores", "instructions", "gpu"}
        assert {"python", "torch"} <= row["versions"].keys()
        assert row["date"].startswith("20")
        assert "commit" in row
    shown = run("table", str(file))
    table = done.stdout.partition("\n\n")[2]
    assert "| ranks | way " in table
    assert table.strip() in shown.stdout


def test_a_table_has_the_spread_beside_each_figure_and_ends_where_columns_change():
    results = [
        Result("times", {"shape": (8, 64)}, {"ms": Spread(1.0, 1.25, 1.5, 11), "wanted": None}),
        Result("times", {"shape": (1, 2)}, {"ms": Spread(1000.0, 2000.0, 3000.0, 11), "wanted": 0.6}),
        Result("errors", {"norm": "sync"}, {"1": Mean(65.44, 0.71, 3), "2": Mean(50.0, None, 1), "4": None}),
    ]
    rows = [{"benchmark": "made", "table": r.table, "case": records.plain(r.case), "figures": records.plain(r.figures)}
            for r in results]  # fmt: skip
    assert [" ".join(line.split()) for line in tables.lines(rows)] == [
        "times",
        "| shape | ms | wanted | n |",
        "| ------ | ------------------- | ------ | -- |",
        "| 8 × 64 | 1.250 (1.000 1.500) | – | 11 |",
        "| 1 × 2 | 2 000 (1 000 3 000) | 0.6 | 11 |",
        "errors",
        "| norm | 1 | 2 | 4 |",
        "| ---- | ------------------ | ---- | - |",
        "| sync | 65.4 ± 0.7 (n = 3) | 50.0 | – |",
    ]


def test_the_other_ranks_take_part_and_are_silent(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")
    runner.run("scale", ["--json", str(tmp_path / "none")])
    assert "| GPUs" not in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
