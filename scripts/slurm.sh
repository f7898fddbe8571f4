#!/usr/bin/env bash
# Trains on the nodes of a Slurm job, and goes on by itself after a preemption and after the time limit.
#
#     sbatch --nodes=4 scripts/slurm.sh DATA OUTPUT [options of train_dist.py]
#
# Submit it from the root of the checkout. The site's lines (partition, account) and sizes go here or to sbatch.
# docs/cluster.md says what is assumed.
#
#   VENV        the environment with torchrun; .venv by default
#   GPUS        ranks on each node; as many as PyTorch sees there by default
#   LOCAL_DISK  a disk of each node, to which DATA is copied once: by default SLURM_TMPDIR, TMPDIR or /tmp, the first
#               that is set; empty: DATA is read where it is
#
#SBATCH --job-name=dcd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "error: name the data and the output: sbatch scripts/slurm.sh DATA OUTPUT [options of train_dist.py]" >&2
    exit 2
fi
output=$2
cd "$SLURM_SUBMIT_DIR"
if [ ! -x scripts/slurm_node.sh ]; then
    echo "error: no scripts/slurm_node.sh in $PWD: submit from the root of the checkout" >&2
    exit 2
fi

# The ranks meet on the first node, where this script and rank 0 run, too.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# torchrun does not pass on the exit code of its ranks, so the run says in this file how it ended.
status() { cat "$output/status.json" 2>/dev/null || true; }
before=$(status)

# When a task has ended, the others have a minute: to write a checkpoint, but not to wait for it for ever.
srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 --wait=60 \
    scripts/slurm_node.sh "$@" &
srun=$!

# USR1: the time is nearly up, or another job takes the nodes. srun passes it to torchrun, and torchrun to the ranks.
# TERM: somebody cancels the job; Slurm itself tells the tasks.
time_is_up='' cancelled='' interrupted=''
trap 'interrupted=yes time_is_up=yes; kill -USR1 "$srun" 2>/dev/null || true' USR1
trap 'interrupted=yes cancelled=yes' TERM
code=0
wait "$srun" || code=$?
while [ -n "$interrupted" ]; do # a signal has ended the wait, not srun
    interrupted='' code=0
    wait "$srun" || code=$?
done

after=$(status) state=''
if [ "$after" != "$before" ]; then # what an earlier attempt has left says nothing of this one
    state=$(sed -n 's/.*"state": "\([a-z]*\)".*/\1/p' <<<"$after")
fi
case $state in
    preempted) again=yes ;;              # stopped by a signal, with a checkpoint
    finished | stopped | failed) again='' ;; # ended by itself; an error would come again
    *) again=$time_is_up ;;              # the signal came before the run could answer, as while data is copied
esac
if [ -n "$again" ] && [ -z "$cancelled" ]; then
    echo "job $SLURM_JOB_ID: ${state:-not started}, and queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 75 # EX_TEMPFAIL, as the trainer's
fi
echo "job $SLURM_JOB_ID: ${state:-not started}, exit code $code"
exit "$code"
