"""Exact statistics of a whole data stream in the running buffers."""
