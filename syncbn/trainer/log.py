"""The log of a rank: a file of the run, and rank 0's warnings on the screen too."""

import logging
from pathlib import Path

from syncbn.trainer.redact import RedactingFormatter


def log_to(path: Path | None, *, warn: bool) -> None:
    """Send this rank's log and warnings to a file, if any, and rank 0's warnings to stderr as well."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)  # of a node that does not see rank 0's disk
    file = logging.FileHandler(path) if path else logging.NullHandler()
    file.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [file]
    if warn:
        screen = logging.StreamHandler()
        screen.setLevel(logging.WARNING)
        screen.setFormatter(RedactingFormatter("%(levelname)s: %(message)s"))
        handlers.append(screen)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a full disk would have each line of the log tell so
