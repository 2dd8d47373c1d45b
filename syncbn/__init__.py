"""Batch norm that is exact over any split of the batch over ranks. Needs torch alone."""

from syncbn.collectives import Group
from syncbn.convert import convert, revert
from syncbn.functional import sync_batch_norm
from syncbn.module import SyncBatchNorm
from syncbn.moments import Moments

__all__ = ["Group", "Moments", "SyncBatchNorm", "convert", "revert", "sync_batch_norm"]
