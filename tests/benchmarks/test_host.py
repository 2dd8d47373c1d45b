"""The host's work for a layer, measured in short: without a GPU, and so on any machine."""

import json
import os
import subprocess
import sys


def test_a_layer_is_four_launches_and_the_ratio_to_torchs_is_printed(tmp_path):
    # What is compiled is compiled for a GPU, which the interpreter of the other tests is none of
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.host", "--seconds", "0.1", "--json", str(tmp_path / "host.json")]

    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "host.json").read_text())
    assert found["launches"] == {"torch": 0, "syncbn": 4, "fused": 4}
    assert all(us > 0 for times in found["us"].values() for us in times)
    assert "wanted: syncbn at most 0.6 of torch; found: 0." in done.stdout
