"""What a run and a sweep leave on disk."""
