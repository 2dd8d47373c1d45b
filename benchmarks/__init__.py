"""What syncbn costs and what it gains, measured: `python -m benchmarks` lists the names, RESULTS.md has the figures."""
