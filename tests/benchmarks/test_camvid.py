"""The study of streets in small, on real runs: what it trains, and what it tells of them."""

import numpy
import pytest
from PIL import Image

from benchmarks import runner
from benchmarks.trainer import camvid, norms


def mask_folder(root, images):
    """Images of 64×72 pixels, of which the right half is brighter and of another class."""
    masks = numpy.zeros((64, 72), dtype=numpy.uint8)
    masks[:, 36:] = 1
    for part, number in images.items():
        for kind in "images", "masks":
            (root / part / kind).mkdir(parents=True)
        for i in range(number):
            noise = numpy.random.default_rng(i).integers(0, 60, (64, 72, 3), dtype=numpy.uint8)
            Image.fromarray(noise + 120 * masks[..., None]).save(root / part / "images" / f"{i}.png")
            Image.fromarray(masks).save(root / part / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("wall\nsky\n")
    return root


@pytest.mark.slow
def test_each_norm_is_trained_and_told_by_its_own_figures(tmp_path, monkeypatch, capfd):
    data = mask_folder(tmp_path / "data", {"train": 8, "val": 3})
    monkeypatch.setattr(norms, "NORMS", ("sync", "group"))
    monkeypatch.setattr(norms, "SEEDS", (0, 1))
    plot = tmp_path / "plot.svg"
    words = ["launch.nproc=2", "model.name=unet", "data.size=64", "train.epochs=2", "wandb.mode=disabled"]

    runner.run("camvid", [str(data), "--runs", str(tmp_path / "runs"), "--plot", str(plot), *words])

    said = capfd.readouterr().out
    assert "4 points: seed × norm" in said
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line[:1] == "|"]
    by_norm = {row[0]: row[1:] for row in rows[:4]}
    assert by_norm["norm"] == [*camvid.STUDY.figures]
    assert all("±" in cell for cell in by_norm["sync"]), said
    assert by_norm["group"][3] == "–", "it has no batch"
    assert rows[4] == ["norm", "wall", "sky"]
    assert "4 runs, 0.0 h of training" in said
    drawn = plot.read_text()
    assert all(f">{text}<" in drawn for text in ("norm=sync", "norm=group", "no batch statistics"))
