"""Both doors as commands, run to their end."""

import os
import subprocess

from tests.launch.jobs import ROOT, STANDALONE

TORCHRUN = [*STANDALONE, "train.py"]


def run(command, *arguments, root=None):
    """The finished process; its run folders go under root."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "OMP_", "MALLOC"))}
    where = [f"run.root={root}"] if root else []
    return subprocess.run(
        [*command, *arguments, *where],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]
