"""How far the ranks' statistics are apart: measured beside training, judged against chance, told in words."""

from syncbn.drift.monitor import DriftMonitor
from syncbn.drift.verdicts import Reading, Verdict

__all__ = ["DriftMonitor", "Reading", "Verdict"]
