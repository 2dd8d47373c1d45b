"""How a run ends other than well: the one kind of error that is the user's to mend, and the exit codes."""

FAILED = 1  # an error of another kind, or another rank was lost
USER_ERROR = 2  # something asked for cannot be done; one line on stderr says what
INCOMPLETE = 3  # trained to the end, but a file could not be written; one line says which
PREEMPTED = 75  # asked to end by a signal, state saved: the same command goes on (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """Something asked for that cannot be done; the text is one line: the value seen, the value wanted, the mend.

    on_every_rank: all ranks raise it together, so that one of them is enough to print it.
    """

    def __init__(self, text: str, *, on_every_rank: bool = False):
        super().__init__(one_line(text))
        self.on_every_rank = on_every_rank


LONGEST = 1000  # characters of a line that somebody reads


def one_line(text: str) -> str:
    """The text as one line: what cannot be printed is escaped, and of a text that is too long the middle left out."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = LONGEST // 2 - 3
    return line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}"
