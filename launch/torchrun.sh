#!/usr/bin/env bash
# One node's share of a job, the line that every carrier ends in: launch/torchrun.sh [KEY=VALUE ...]
# How many nodes there are and where they meet is told by PET_... variables, torchrun's own for each of its options
# (PET_NNODES for --nnodes, PET_RDZV_ENDPOINT, PET_LOCAL_ADDR, ...); without any, this machine is the whole job.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -d .venv ]; then PATH="$PWD/.venv/bin:$PATH"; fi

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # torch 2.15 loses the ranks' store in a restart otherwise
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}" # s to save in; torch has 30
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}"
export PET_MAX_RESTARTS="${PET_MAX_RESTARTS:-3}"

exec torchrun train.py "$@"
