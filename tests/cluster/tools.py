"""What the tests on real engines need of the machine."""

import os
import shutil

import pytest


def require(*commands, packages, root=False):
    """Skip the test where a command is missing, or root's rights; where CI is set, fail it: there all is to be had."""
    missing = [command for command in commands if shutil.which(command) is None]
    why = []
    if missing:
        why.append(f"{', '.join(missing)} not found: apt-get install {packages}")
    if root and os.geteuid() != 0:
        why.append("daemons are started by root")
    if why:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("; ".join(why))
