"""Another process that a test starts, listens to and kills."""

import os
import signal
from contextlib import contextmanager


@contextmanager
def another(job):
    """Another process that does job(say), and is killed at the end: its pid, and what reads the next line it said."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            job(lambda text: os.write(theirs, f"{text}\n".encode()))
        finally:
            os._exit(0)
    os.close(theirs)
    try:
        with os.fdopen(ours) as said:
            yield pid, said.readline
    finally:
        kill(pid)


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
