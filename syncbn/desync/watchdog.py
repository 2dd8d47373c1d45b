"""Tell when this rank makes no progress because another has not come: threads beside the training."""

import json
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, NamedTuple

from syncbn import collectives
from syncbn.collectives import ProcessGroup
from syncbn.desync.journal import MANY, Journal, listed, name_of


class _Post(NamedTuple):
    """What a rank said of itself, at posted_s, when it was read: whether it is done, its step and messages by group."""

    read_s: float
    posted_s: float
    closed: bool
    step: int
    messages: dict[str, tuple[int, int]]


class Watchdog:
    """Two threads, as one may be stuck in the store: it posts and reads progress, the other judges.

    stall: what was reported of the stall that this rank is in, None if nothing was.
    """

    def __init__(
        self,
        names: Sequence[str],
        journal: Journal,
        patience_s: float,
        report: Callable[[str], Any],
        everyone: ProcessGroup,
        key: str,
    ):
        self._names, self._journal, self._patience_s, self._report = names, journal, patience_s, report
        self._everyone, self._key, self._rank = everyone, f"syncbn/desync/{key}", everyone.rank()
        self._store = collectives.store()
        self.stall: str | None = None
        self._peers: dict[int, _Post] = {}
        self._start = monotonic()
        self._post(closed=False)
        # Nobody reads before all have posted, and all clocks start together
        collectives.gather_objects(None, everyone)
        self._start = self._advanced = self._answered = monotonic()
        self._interval_s = min(max(patience_s / 4, 0.2), 5.0)
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=run, name="syncbn", daemon=True) for run in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=2.0)

    def _talk(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stopped.wait(self._interval_s)
            try:
                self._post(closed=stopped)
                # Reading costs a store W² answers, so only ranks in want of an explanation read
                if not stopped and self._stalled_s() > self._patience_s / 2:
                    self._read()
                self._answered = monotonic()
            except RuntimeError:
                # The judge sees that there is no answer
                continue

    def _post(self, closed: bool) -> None:
        # Hashes of tuples of ints are the same in every process
        messages = {hash(ranks): messages.at for ranks, messages in list(self._journal.by_ranks.items())}
        post = [monotonic() - self._start, closed, self._journal.step, messages]
        self._store.set(f"{self._key}/{self._rank}", json.dumps(post))

    def _read(self) -> None:
        others = [rank for rank in range(self._everyone.size()) if rank != self._rank]
        posts = self._store.multi_get([f"{self._key}/{rank}" for rank in others])
        read_s = monotonic() - self._start
        self._peers = {rank: _Post(read_s, *json.loads(post)) for rank, post in zip(others, posts, strict=True)}

    def _judge(self) -> None:
        seen, reported = 0, -1
        woke = monotonic()
        while not self._stopped.wait(self._interval_s):
            slept_s, woke = monotonic() - woke, monotonic()
            if collectives.everyone() is not self._everyone:
                self._stopped.set()
            made = self._journal.progress()
            # After a sleep too long it was this process that was stopped, or starved
            if made != seen or slept_s > 2 * self._interval_s:
                self.stall = self.stall if made == seen else None
                seen, self._peers = made, {}
                self._advanced = self._answered = woke
            elif made != reported and self._stalled_s() >= self._patience_s:
                causes = self._store_is_silent() or self._late()
                if causes:
                    reported, self.stall = made, self._text(causes)
                    self._report(self.stall)

    def _stalled_s(self) -> float:
        return monotonic() - self._advanced

    def _store_is_silent(self) -> list[str]:
        silent_s = monotonic() - self._answered
        if silent_s < max(self._patience_s / 2, 2.0):
            return []
        return [
            f"no rank can be heard, as the process group's store has not answered for {silent_s:.0f} s: the process "
            "that hosts it, rank 0 or the launcher, is stopped or gone"
        ]

    def _late(self) -> list[str]:
        """What each rank that keeps this one waiting was last known to do; empty if none does."""
        late = []
        for rank, post in self._peers.items():
            # A post from before this rank began to wait may be older than the peer's last progress
            current = post.closed or post.posted_s > self._advanced - self._start
            silent_s = post.read_s - post.posted_s
            if (self._elsewhere(rank, post) and current) or (silent_s >= self._patience_s and not post.closed):
                heard = "whose monitor is closed" if post.closed else f"last heard of {max(silent_s, 0):.0f} s ago"
                late.append(f"rank {rank}, {heard}, had made {self._progress_of(post)}")
        return late

    def _elsewhere(self, rank: int, post: _Post) -> bool:
        """Whether a peer is at an earlier step than this rank, or not at the message that both are to make."""
        if post.step < self._journal.step:
            return True
        if rank not in self._journal.latest:
            return False
        total, code = self._journal.by_ranks[self._journal.latest].at
        theirs, their_code = self._messages(post)
        return theirs < total or (theirs == total and their_code != code)

    def _messages(self, post: _Post) -> tuple[int, int]:
        return post.messages.get(str(hash(self._journal.latest)), (0, -1))

    def _progress_of(self, post: _Post) -> str:
        total, code = self._messages(post)
        last = f", the last in {name_of(code, self._names)}" if total else ""
        return f"{total} messages{last}" + (f", and was in step {post.step}" if post.step >= 0 else "")

    def _text(self, causes: list[str]) -> str:
        more = [f"and {len(causes) - MANY} more ranks alike"] if len(causes) > MANY else []
        here = "; ".join([f"this rank ({self._rank}) {self._here()}", *causes[:MANY], *more])
        return f"no progress for {self._stalled_s():.0f} s: {here}"

    def _here(self) -> str:
        """What this rank does."""
        journal = self._journal
        step = f", in step {journal.step}" if journal.step >= 0 else ""
        if not journal.latest:
            return f"has made no message{step}"
        total, code = journal.by_ranks[journal.latest].at
        group = "" if len(journal.latest) == self._everyone.size() else f" of {listed(journal.latest)}"
        doing = "waits in" if journal.in_flight else "last sent"
        return f"{doing} message {total}{group}, {name_of(code, self._names)}{step}"
