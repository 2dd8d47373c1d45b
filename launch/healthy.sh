#!/bin/sh
# Whether training in this container gets on: the run whose logs its ranks have open has written a figure lately.
set -eu
log=$(readlink /proc/[0-9]*/fd/* 2> /dev/null | grep -m 1 '/logs/rank[0-9]*\.log$') ||
  { echo "no rank trains yet"; exit 1; }
run=${log%/logs/*}
minutes=${HEALTHY_WITHIN_MIN:-15}
find "$run" -maxdepth 1 \( -name metrics.jsonl -o -name status.json \) -mmin "-$minutes" | grep -q . ||
  { echo "$run: no figure for $minutes minutes"; exit 1; }
echo "$run"
