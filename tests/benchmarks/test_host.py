"""The host's work for a layer, measured in short: without a GPU, and so on any machine."""

import os
import subprocess
import sys

from benchmarks.measure import records


def test_a_layer_is_four_launches_and_the_ratio_to_torchs_is_printed(tmp_path):
    # What is compiled is compiled for a GPU, which the interpreter of the other tests is none of
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks", "host", "--seconds", "0.1", "--json", str(tmp_path / "host.jsonl")]

    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    rows = {row["case"]["contestant"]: row["figures"] for row in records.read(tmp_path / "host.jsonl")}
    assert {name: figures["launches"] for name, figures in rows.items()} == {"torch": 0, "syncbn": 4, "fused": 4}
    assert all(figures["us a layer"]["low"] > 0 for figures in rows.values())
    assert 0 < rows["syncbn"]["of torch"]["median"] < 1
    assert rows["syncbn"]["wanted"] == 0.6
    assert "| syncbn     |" in done.stdout
