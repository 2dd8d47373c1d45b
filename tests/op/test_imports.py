"""`import syncbn` is light, whatever else is installed."""

import subprocess
import sys


def test_the_operator_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import syncbn; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "['syncbn']"
