"""What a process hands to its process groups, whoever asks for it."""

from contextlib import contextmanager
from unittest.mock import patch

from torch.distributed import ProcessGroup

# Of each collective, where the tensor stands that is sent
SENT = {"allreduce": 0, "broadcast": 0, "allgather": 1, "_allgather_base": 1, "all_gather_single": 1}
NAMES = {"allreduce": "all_reduce", "_allgather_base": "all_gather", "all_gather_single": "all_gather"}


@contextmanager
def recorded():
    """A list of every collective within, in order: its name, the number of elements that a rank sends, their dtype."""
    found = []

    def recording(name, real):
        def collective(group, *arguments, **options):
            tensor = arguments[SENT[name]]
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            found.append((NAMES.get(name, name), tensor.numel(), tensor.dtype))
            return real(group, *arguments, **options)

        return collective

    # The last has come with torch 2.15
    names = [name for name in SENT if hasattr(ProcessGroup, name)]
    patches = [patch.object(ProcessGroup, name, recording(name, getattr(ProcessGroup, name))) for name in names]
    for one in patches:
        one.start()
    try:
        yield found
    finally:
        for one in patches:
            one.stop()
