#!/bin/sh
# The line that every carrier ends in: torchrun's agent on this node, for its ranks of `train.py "$@"`.
# torchrun takes each of its options from the environment too: PET_NNODES for --nnodes, PET_NPROC_PER_NODE,
# PET_RDZV_BACKEND, PET_RDZV_ENDPOINT, PET_RDZV_ID, PET_RDZV_CONF, PET_LOCAL_ADDR, PET_MAX_RESTARTS, ...
set -eu
cd "$(dirname "$0")/.."
# torch 2.15 loses the ranks' store in a restart without it
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
# Seconds that ranks have to save when they are asked to end; torch's 30 are few for a large model
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"
exec torchrun train.py "$@"
