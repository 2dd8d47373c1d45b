"""Notice when ranks run different layers: a fingerprint in each message, a log to name them, a watchdog for hangs."""

from syncbn.desync.monitor import DesyncError, DesyncMonitor

__all__ = ["DesyncError", "DesyncMonitor"]
