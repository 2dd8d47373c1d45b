"""Which ranks of a group share memory: all agree before the first message, or none uses it."""

import os
import socket
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from syncbn.shared_memory import mailbox
from syncbn.shared_memory.mailbox import NONCE_BYTES, Mailbox

# Some times what it takes to wake a core that sleeps: two ranks on two cores that slept at each message took twice as
# long for a layer
SPIN_NS = 200_000


class Offer(NamedTuple):
    """What a rank says of itself.

    host: equal for processes of one host that see each other in /proc.
    cores: on which it may run.
    path: where others find the memory that it made, "" if it made none.
    nonce: what that begins with.
    error: why there is none, if that is worth telling.
    """

    host: tuple[Any, ...] = ()
    cores: frozenset[int] = frozenset()
    path: str = ""
    nonce: bytes = b""
    error: str = ""


class Agreement(NamedTuple):
    """How a group's ranks reach each other.

    mailbox: of those on this rank's host; None if it is alone there.
    leaders: the first rank of each host.
    name: of this agreement, as no other has.
    """

    mailbox: Mailbox | None
    leaders: tuple[int, ...]
    name: str


def agree(
    ranks: Sequence[int], rank: int, crowd: int, timeout_s: float, gather: Callable[[Any], list[Any]]
) -> Agreement | None:
    """Open a mailbox on each host of a group; None, on every rank, if there is none to open or one cannot be.

    Args:
        ranks: the group's, in its order.
        rank: this one.
        crowd: how many ranks, of whatever group, run on this host.
        timeout_s: of each message.
        gather: makes a list of every member's value, in the group's order.

    Collective: two gathers.
    """
    file, offer = _offer(len(ranks))
    try:
        offers: dict[int, Offer] = dict(zip(ranks, gather(offer), strict=True))
        if not all(offer.path for offer in offers.values()):
            return _none({other: offer.error for other, offer in offers.items()}, rank)
        hosts = {offer.host: [r for r in ranks if offers[r].host == offer.host] for offer in offers.values()}
        if len(hosts) == len(ranks):
            return None
        opened, error = _open(file, {r: offers[r] for r in hosts[offer.host]}, rank, crowd, timeout_s)
        errors = gather(error)
    finally:
        # Until here peers may open it
        if file is not None:
            os.close(file)
    if any(errors):
        return _none(dict(zip(ranks, errors, strict=True)), rank)
    return Agreement(opened, tuple(neighbours[0] for neighbours in hosts.values()), offers[ranks[0]].nonce.hex())


def _offer(ranks: int) -> tuple[int | None, Offer]:
    """A file for so many ranks and how to find it. It has no name, so nothing is left behind, whoever dies when."""
    if not mailbox.available():
        return None, Offer()
    try:
        file = os.memfd_create("syncbn")
        try:
            os.truncate(file, mailbox.size_bytes(ranks))
            nonce = os.urandom(NONCE_BYTES)
            os.pwrite(file, nonce, 0)
            cores = frozenset(os.sched_getaffinity(0))
            return file, Offer(_host(), cores, f"/proc/{os.getpid()}/fd/{file}", nonce)
        except OSError:
            os.close(file)
            raise
    except OSError as error:
        return None, Offer(error=str(error))


def _host() -> tuple[Any, ...]:
    """Equal host names say little; a container is a host of its own, and so is a network namespace."""
    namespaces = (os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "net"))
    return socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text(), *namespaces


def _open(
    file: int | None, neighbours: dict[int, Offer], rank: int, crowd: int, timeout_s: float
) -> tuple[Mailbox | None, str]:
    """The mailbox of a host's ranks, in the memory of the first, or None and why."""
    first = next(iter(neighbours))
    if len(neighbours) == 1:
        return None, ""
    cores = frozenset[int]().union(*(offer.cores for offer in neighbours.values()))
    spin_ns = SPIN_NS if max(crowd, len(neighbours)) <= len(cores) else 0
    try:
        if rank == first:
            assert file is not None
            # That there is too little shows here, and not in the middle of a message
            os.posix_fallocate(file, 0, mailbox.size_bytes(len(neighbours)))
        theirs = os.open(neighbours[first].path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return Mailbox(theirs, neighbours[first].nonce, rank, list(neighbours), timeout_s, spin_ns), ""
        finally:
            os.close(theirs)
    except OSError as error:
        return None, str(error)


def _none(errors: dict[int, str], rank: int) -> None:
    """No mailbox; the first rank that has a reason tells it."""
    if rank == next((other for other, error in errors.items() if error), None):
        warnings.warn(f"messages go through gloo, as rank {rank} has no shared memory: {errors[rank]}", stacklevel=2)
