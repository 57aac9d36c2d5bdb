#!/bin/bash
# Train on several nodes under SLURM; a job that meets its time limit or is preempted continues by itself.
#
#   RUN=/shared/runs/first sbatch --nodes=4 examples/slurm.sh trex --data /shared/imagenet
#
# What follows the script's name goes to `fastrex train`. RUN is the run directory, on a disk that every node sees.
# LAUNCHER=srun starts the ranks without torchrun. RANKS_PER_NODE: default, the GPUs of a node.

#SBATCH --job-name=fastrex
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
# SLURM itself starts the job again when a node fails or another job preempts it.
#SBATCH --requeue
# Five minutes before the time limit every step gets SIGUSR1; all ranks save at the same step and leave.
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u

if ! [[ "${SLURM_JOB_ID:-}" =~ ^[0-9]+$ ]]; then
  echo "slurm.sh: must be started by sbatch, got SLURM_JOB_ID='${SLURM_JOB_ID:-}'" >&2
  exit 2
fi
RUN=${RUN:-runs/slurm-$SLURM_JOB_ID}
RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
nodes=$SLURM_JOB_NUM_NODES
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Two jobs on one node do not meet.
port=$((20000 + SLURM_JOB_ID % 10000))

cpus=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=$((cpus > RANKS_PER_NODE ? cpus / RANKS_PER_NODE : 1))
# The index of a data set is written by rank 0 and read by all: on a disk that every node sees. Compiled kernels are
# written by every node: on a disk of its own.
export FASTREX_CACHE=${FASTREX_CACHE:-$HOME/.cache/fastrex}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-${USER:-$UID}}
# Which network carries the gradients, where a node has several:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Not --resume must: the first start has nothing to continue. A changed number of ranks stops the job unless
# --allow-world-size-change is among the script's own words.
train=(train "$@" --out "$RUN" --resume auto)

with_torchrun() {
  # A job that lost a rank starts again from its last checkpoint as long as the nodes are there. While ranks and
  # launchers share a store, which is the default, torchrun cannot take in a launcher that was started anew.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  # How long ranks have to save after a signal (torch 2.13; 30 s before that).
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
  # srun does not take --cpus-per-task over from sbatch.
  srun --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=1 \
    torchrun --nnodes="$nodes" --nproc-per-node="$RANKS_PER_NODE" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-conf=join_timeout=900,read_timeout=600 \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
    -m fastrex "${train[@]}"
}

with_srun() {
  export MASTER_ADDR=$first MASTER_PORT=$port WORLD_SIZE=$((nodes * RANKS_PER_NODE)) LOCAL_WORLD_SIZE=$RANKS_PER_NODE
  # The rank's own numbers are known inside the task only. --gpu-bind=none: ranks of a node see one another's GPUs.
  # shellcheck disable=SC2016
  srun --ntasks="$WORLD_SIZE" --ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task="$OMP_NUM_THREADS" \
    --gpu-bind=none --kill-on-bad-exit=1 \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec fastrex "$@"' fastrex "${train[@]}"
}

# status.json, and a field of it; empty before the run exists.
status() {
  fastrex status "$RUN" --json 2>/dev/null || echo '{}'
}
field() {
  python3 -c 'import json, sys; print(json.load(sys.stdin).get(sys.argv[1]) or "")' "$1"
}

before=$(status | field checkpoint)
case "${LAUNCHER:-torchrun}" in
  torchrun) with_torchrun & ;;
  srun) with_srun & ;;
  *)
    echo "slurm.sh: LAUNCHER must be torchrun or srun, got '$LAUNCHER'" >&2
    exit 2
    ;;
esac
step=$!
# Preemption signals this shell too; it has to outlive the step, which handles the signal itself.
trap 'echo "slurm.sh: signalled, waiting for the ranks to save"' TERM USR1
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
  code=$?
done

now=$(status)
state=$(field state <<<"$now")
after=$(field checkpoint <<<"$now")
echo "slurm.sh: $RUN is ${state:-without a status}, newest checkpoint ${after:-none}, the step's exit code was $code"
case "$state" in
  completed) exit 0 ;;
  preempted)
    # A job whose time is too short for a single checkpoint would start for ever.
    if [[ "$after" == "$before" ]]; then
      echo "slurm.sh: not requeued: no progress since the last start; give the job more --time" >&2
      exit 1
    fi
    exec scontrol requeue "$SLURM_JOB_ID"
    ;;
  # failed, diverged: another start would end the same way.
  *) exit $((code ? code : 1)) ;;
esac
