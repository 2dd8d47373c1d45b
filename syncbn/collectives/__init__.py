"""Everything the operator says to other ranks: nothing outside this folder knows torch.distributed.

process_groups.py forms the groups, messages.py carries the messages of layers, one each way.
"""

from torch.distributed import ProcessGroup  # pyright: ignore[reportPrivateImportUsage]

from syncbn.collectives.differentiable import is_hidden_batch, summed
from syncbn.collectives.log_time import gather_objects, gather_rows, sum_rows
from syncbn.collectives.messages import (
    Direction,
    Exchange,
    Line,
    Reduction,
    Witness,
    check_reduction,
    form,
    line,
    refuse,
    share_moments,
    share_sums,
)
from syncbn.collectives.process_groups import Group, Spec, check_group, resolve, resolve_once
from syncbn.collectives.world import available, everyone, ranks_of, store

__all__ = [
    "Direction",
    "Exchange",
    "Group",
    "Line",
    "ProcessGroup",
    "Reduction",
    "Spec",
    "Witness",
    "available",
    "check_group",
    "check_reduction",
    "everyone",
    "form",
    "gather_objects",
    "gather_rows",
    "is_hidden_batch",
    "line",
    "ranks_of",
    "refuse",
    "resolve",
    "resolve_once",
    "share_moments",
    "share_sums",
    "store",
    "sum_rows",
    "summed",
]
