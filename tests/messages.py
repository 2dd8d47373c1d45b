"""What a process hands to its process groups, or leaves in memory that their ranks share, whoever asks for it."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.distributed import ProcessGroup, ProcessGroupGloo

from syncbn import collectives
from syncbn.shared_memory import Mailbox

# Of each collective, where the tensor stands that is sent
SENT = {"allreduce": 0, "broadcast": 0, "allgather": 1, "_allgather_base": 1, "all_gather_single": 1}
NAMES = {"allreduce": "all_reduce", "_allgather_base": "all_gather", "all_gather_single": "all_gather"}
THROUGH_MEMORY = {"add": "all_reduce", "gather": "all_gather"}
LEADERS = "all_reduce of leaders"


def recording_lines(sent, real):
    """Of the messages that C sends itself."""

    def line(exchange, values, device, direction):
        one = real(exchange, values, device, direction)
        if one is not None and one.mailbox is not None:
            sent.append(("all_reduce", values, torch.float64))
        return one

    return line


@contextmanager
def recorded():
    """A list of every collective within, in order: its name, the number of elements that a rank sends, their dtype.

    Among the first ranks of several hosts, all_reduce has a name of its own.
    """
    sent = []

    def recording(name, place, real):
        def collective(group, *arguments, **options):
            tensor = arguments[place]
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            sent.append((name, tensor.numel(), tensor.dtype))
            return real(group, *arguments, **options)

        return collective

    # The last has come with torch 2.15
    watched = [(ProcessGroup, name, NAMES.get(name, name), at) for name, at in SENT.items()]
    watched += [(Mailbox, name, shown, 0) for name, shown in THROUGH_MEMORY.items()]
    watched += [(ProcessGroupGloo, "allreduce", LEADERS, 0)]
    patches = [
        patch.object(owner, name, recording(shown, at, getattr(owner, name)))
        for owner, name, shown, at in watched
        if hasattr(owner, name)
    ]
    patches.append(patch.object(collectives, "line", recording_lines(sent, collectives.line)))
    for one in patches:
        one.start()
    try:
        yield sent
    finally:
        for one in patches:
            one.stop()
