"""The study of blood cells in small, on real runs: what it trains, and what it tells of them."""

import pytest

from benchmarks import runner
from benchmarks.trainer import bccd, norms
from tests.trainer.detection import voc


@pytest.mark.slow
def test_each_norm_is_trained_on_two_images_a_rank_and_told_by_its_own_figures(tmp_path, monkeypatch, capfd):
    voc(tmp_path / "data")
    monkeypatch.setattr(norms, "NORMS", ("sync", "none"))
    monkeypatch.setattr(norms, "SEEDS", (0,))
    plot = tmp_path / "plot.svg"
    words = ["launch.nproc=1", "model.name=small_ssd", "model.anchor_sizes=[17,23,29,38]", "wandb.mode=disabled"]

    runner.run("bccd", [str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--plot", str(plot), *words])

    said = capfd.readouterr().out
    assert "1 × 2 images on cpu | 16 steps" in said
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line[:1] == "|"]
    by_norm = {row[0]: row[1:] for row in rows[:4]}
    assert by_norm["norm"] == [*bccd.STUDY.figures]
    assert by_norm["none"][3] == "–", "it has no batch"
    assert rows[4] == ["norm", "cat", "dog"]
    assert all(f">{text}<" in plot.read_text() for text in ("norm=sync", "norm=none"))
