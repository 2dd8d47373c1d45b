"""The study in small, on real runs: what it trains, and what it tells of them."""

import re

import pytest

from benchmarks import runner
from benchmarks.trainer import small_batch
from tests.trainer.images import image_folder


def table(said, title):
    """{norm: cells} of the table below a title."""
    lines = said.partition(f"\n{title}\n\n")[2].partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["norm", *map(str, small_batch.BATCHES)]
    return {norm: values for norm, *values in cells[2:]}


@pytest.mark.slow
def test_every_norm_is_trained_at_every_batch_and_told_by_its_own_figures(tmp_path, monkeypatch, capfd):
    data = image_folder(tmp_path / "data", {"a": 24, "b": 24}, {"a": 3, "b": 5}, size=16)
    for name, values in {"NORMS": ("local", "group"), "BATCHES": (2, 4), "SEEDS": (0,)}.items():
        monkeypatch.setattr(small_batch, name, values)
    runs, plot = tmp_path / "runs", tmp_path / "plot.svg"
    words = ["launch.nproc=2", "data.train_images=48"]
    command = [str(data), "--runs", str(runs), "--plot", str(plot), *words]

    runner.run("small_batch", command)

    said = capfd.readouterr().out
    assert "4 points: data.batch_per_rank × norm" in said
    for title in "Test error, %", "Train/eval gap, points of accuracy":
        for norm in "local", "group":
            assert all(re.fullmatch(r"-?\d+\.\d", cell) for cell in table(said, title)[norm]), said
    errors = [float(cell) for cells in table(said, "Test error, %").values() for cell in cells]
    assert all(error % 12.5 == 0 for error in errors)  # of 8 images
    assert table(said, "Points of accuracy that exact statistics give back")["group"] == ["–", "–"]
    small, larger = (float(cell) for cell in table(said, "Effective batch size of the worst layer")["local"])
    assert small < larger
    assert re.search(r"^4 runs, 0\.\d h of training$", said, re.M)
    assert all(f">{norm}<" in plot.read_text() for norm in ("local", "group"))

    runner.run("small_batch", command)  # all is done: told again, and not trained again
    again = capfd.readouterr().out
    assert again.count("is finished") == 4
    assert table(again, "Test error, %") == table(said, "Test error, %")
