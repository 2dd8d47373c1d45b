"""How a run ends other than well: the one kind of error that is the user's to mend, exit codes, and signals."""

import signal
from collections.abc import Sequence
from typing import Any

FAILED = 1  # an error of another kind, or another rank was lost
USER_ERROR = 2  # something asked for cannot be done; one line on stderr says what
INCOMPLETE = 3  # trained to the end, but a file could not be written; one line says which
PREEMPTED = 75  # asked to end by a signal, state saved: the same command goes on (EX_TEMPFAIL of sysexits.h)
FINAL = (USER_ERROR, INCOMPLETE, PREEMPTED)  # of ranks that another try would not change, or should not


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # ask a rank to save and end


class UserError(Exception):
    """Something asked for that cannot be done; the text is one line: the value seen, the value wanted, the mend.

    on_every_rank: all ranks raise it together, so that one of them is enough to print it.
    """

    def __init__(self, text: str, *, on_every_rank: bool = False):
        super().__init__(one_line(text))
        self.on_every_rank = on_every_rank


class RanksFailed(RuntimeError):
    """The ranks of a run ended in an error. reason: what a rank said of it, in one line; empty if none did.
    rank: the one that the others fell with.

    (torch's own error does not survive the way back to a sweep.)
    """

    def __init__(self, text: str, exit_code: int, reason: str = "", rank: int = 0):
        super().__init__(text)
        self.exit_code = exit_code
        self.reason = reason
        self.rank = rank

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.exit_code, self.reason, self.rank)


class Ended(RanksFailed):
    """A signal to this process has ended the ranks, as was asked for: another try would go against it."""


LONGEST = 1000  # characters of a line that somebody reads


def one_line(text: str) -> str:
    """The text as one line: what cannot be printed is escaped, and of a text that is too long the middle left out."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = LONGEST // 2 - 3
    return line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def some(names: Sequence[str], most: int, between: str = ", ", more: str = "more") -> str:
    """The first of the names, and how many more there are."""
    left = f" and {len(names) - most} {more}" if len(names) > most else ""
    return between.join(names[:most]) + left
