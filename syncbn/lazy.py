"""A SyncBatchNorm that learns its number of channels from its first input."""
