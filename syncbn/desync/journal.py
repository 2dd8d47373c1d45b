"""What this rank sent to whom, and the words to tell it in."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from syncbn import collectives
from syncbn.collectives import ProcessGroup

Ranks = tuple[int, ...]
# Messages since the last check, and the codes of the latest of them
Stream = tuple[int, list[int]]
Streams = dict[Ranks, Stream]

# So many of the messages since the last check are remembered
LOG = 2**15
# So many ranks are listed by number
MANY = 16


class Messages:
    """What this rank sent to one set of ranks: (number of messages, code of the last), and codes since the check."""

    def __init__(self) -> None:
        self.at: tuple[int, int] = (0, -1)
        self.checked = 0
        self.log: deque[int] = deque(maxlen=LOG)


class Journal:
    """What this rank sent to whom, and how far its loop says that it is.

    latest: the ranks of its latest message; in_flight while that is awaited.
    step: the loop's number, -1 before there is one. signs: how often it said that it is alive.
    """

    def __init__(self) -> None:
        self.step = -1
        self.signs = 0
        self.by_ranks: dict[Ranks, Messages] = {}
        self.latest: Ranks = ()
        self.in_flight = False
        self._by_group: dict[ProcessGroup, tuple[Ranks, Messages]] = {}

    def add(self, group: ProcessGroup, code: int) -> None:
        if group not in self._by_group:
            ranks = collectives.ranks_of(group)
            self._by_group[group] = ranks, self.by_ranks.setdefault(ranks, Messages())
        self.latest, messages = self._by_group[group]
        messages.at = messages.at[0] + 1, code
        messages.log.append(code)
        self.in_flight = True

    def alive(self, step: int | None) -> None:
        self.signs += 1
        if step is not None:
            self.step = step

    def progress(self) -> int:
        """A number that grows whenever this rank gets on."""
        return self.signs + sum(messages.at[0] for messages in list(self.by_ranks.values()))

    def clear(self) -> None:
        for messages in self.by_ranks.values():
            messages.checked = messages.at[0]
            messages.log.clear()


def camps(said: Iterable[tuple[int, Any]]) -> dict[Any, list[int]]:
    """The ranks that said each thing, the largest camp first."""
    ranks_by_word: dict[Any, list[int]] = {}
    for rank, thing in said:
        ranks_by_word.setdefault(thing, []).append(rank)
    return dict(sorted(ranks_by_word.items(), key=lambda camp: -len(camp[1])))


def compare(ranks_by_word: dict[Any, list[int]], verb: str) -> str:
    most, *others = (f"{listed(camp)} {verb} {thing}" for thing, camp in ranks_by_word.items())
    return f"{', '.join(others)} where {most}"


def name_of(code: int, names: Sequence[str]) -> str:
    return "none" if code < 0 else f"{names[code // 2]} ({'backward' if code % 2 else 'forward'})"


def listed(ranks: Sequence[int]) -> str:
    some = ", ".join(map(str, ranks[:MANY])) + (f" and {len(ranks) - MANY} more" if len(ranks) > MANY else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {some}"
