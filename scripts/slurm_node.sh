#!/usr/bin/env bash
# One node's part of scripts/slurm.sh, which starts it there: copies the data to the node's disk, then starts its ranks.
set -euo pipefail
data=$1 output=$2
shift 2
PATH="${VENV:-$PWD/.venv}/bin:$PATH"
disk=${LOCAL_DISK-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}
if [ -n "$disk" ]; then
    data=$(python -m tools.stage_dataset "$data" "$disk") # prints where to read: there, or where it was
fi
# Two hours for all nodes to come here: one of them may have the copy already.
exec torchrun --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="${GPUS:-gpu}" \
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --rdzv-conf=timeout=7200 \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    train_dist.py "$@" -d "$data" -c "$output"
