#!/usr/bin/env bash
# Train under Slurm: submits itself with sbatch, then starts the processes in the job.
#   bash launch/slurm.sh [--print] [SBATCH OPTIONS] -- TRAINING ARGUMENTS
#   bash launch/slurm.sh --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --time=24:00:00 -- \
#     --config=configs/llama3_8b.py --workdir=runs/a
# One process per GPU (as many tasks as GPUs on a node), or one per node (the default).
# Never --gpus-per-task or --gpu-bind: JAX picks among all GPUs of the node by local rank.
#
# 300 s before the time limit, Slurm sends SIGTERM to the job's steps, that is, to every
# training process and not to this script ("B:" would do the reverse). They save and exit
# with 75, srun passes that on, and this script requeues the job.
#SBATCH --job-name=flaxlm
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
#SBATCH --ntasks-per-node=1
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ] || [ "${1:-}" = --print ]; then
  cd "$(dirname "$0")/.."
  source launch/common.sh
  if [ "${1:-}" = --print ]; then
    printing=1
    shift
  fi
  options=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  [ $# -gt 1 ] || refuse "needed: -- and the training arguments, after sbatch's options"
  run sbatch "${options[@]}" launch/slurm.sh "$@"
  [ -n "$printing" ] || exit 0
else
  cd "$SLURM_SUBMIT_DIR" # Slurm runs a copy of this script from elsewhere
  source launch/common.sh
  source launch/environment.sh
  source launch/xla_flags.sh auto
fi
shift # the --

# With one process per node, JAX would use only GPU 0.
if [ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ] && [ "${SLURM_GPUS_ON_NODE:-1}" -gt 1 ]; then
  JAX_LOCAL_DEVICE_IDS="$(seq -s , 0 "$((SLURM_GPUS_ON_NODE - 1))")"
  export JAX_LOCAL_DEVICE_IDS
fi
# Processes have two minutes to finish saving after the first one exits.
step=(srun --kill-on-bad-exit=0 --wait=120 python -m flaxlm.train "$@" --config.mesh.multihost=true)
code=0
# A crash restarts within the job, a few times; 75 ends the step so that it is requeued.
run python -m flaxlm.supervise --final=75 --max_restarts=3 -- "${step[@]}" || code=$?
if [ -n "$printing" ]; then
  echo "# after exit code 75:"
  SLURM_JOB_ID="${SLURM_JOB_ID:-JOB_ID}" code=75
fi
if [ "$code" = 75 ]; then
  run scontrol requeue "$SLURM_JOB_ID"
fi
[ -n "$printing" ] || exit "$code"
