"""The report of runs and of sweeps: one HTML file that needs nothing else."""
