"""Batch norm that is exact over any split of the batch over ranks. Needs torch alone."""

from syncbn.collectives import Group, Reduction, check_group
from syncbn.convert import Conversion, convert, revert
from syncbn.desync import DesyncError, DesyncMonitor
from syncbn.drift import DriftMonitor, Reading, Verdict
from syncbn.functional import sync_batch_norm
from syncbn.groups import group_size
from syncbn.lazy import LazySyncBatchNorm
from syncbn.module import SyncBatchNorm
from syncbn.moments import Moments
from syncbn.patterns import has_hooks
from syncbn.recalibrate import recalibrate

__all__ = [
    "Conversion",
    "DesyncError",
    "DesyncMonitor",
    "DriftMonitor",
    "Group",
    "LazySyncBatchNorm",
    "Moments",
    "Reading",
    "Reduction",
    "SyncBatchNorm",
    "Verdict",
    "check_group",
    "convert",
    "group_size",
    "has_hooks",
    "recalibrate",
    "revert",
    "sync_batch_norm",
]
