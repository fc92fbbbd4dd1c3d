#!/usr/bin/env bash
# Train on this machine: one process for all its devices, or several that work together.
#   bash launch/local.sh --config=configs/quickstart.py --workdir=runs/a
#   bash launch/local.sh -n 2 --config=configs/quickstart.py --workdir=runs/a     # CPU
#   bash launch/local.sh -n gpus --config=configs/gpt2_124m.py --workdir=runs/a   # one per GPU
# --print (first) shows the commands and runs none.
# The exit code is that of the first process that failed: 75 means "run it again".
set -euo pipefail
source "$(dirname "$0")/common.sh"
if [ "${1:-}" = --print ]; then
  printing=1
  shift
fi
processes=1
devices=
if [ "${1:-}" = -n ]; then
  processes="${2:-}"
  shift 2 || refuse "-n needs a number of processes, or gpus"
fi
if [ "$processes" = gpus ]; then
  devices=1 # per process; otherwise JAX would give every process all of them
  processes="$( (nvidia-smi -L 2>/dev/null || true) | wc -l)"
  [ "$processes" -gt 0 ] || refuse "-n gpus: nvidia-smi finds no GPU on this machine"
fi
need "-n" "$processes" '[1-9][0-9]{0,3}'
train=(python -m flaxlm.train "$@")
if [ -n "$printing" ]; then
  echo "source launch/environment.sh && source launch/xla_flags.sh auto"
else
  source "$(dirname "$0")/environment.sh"
  source launch/xla_flags.sh auto
fi
if [ "$processes" = 1 ]; then
  [ -z "$printing" ] || run "${train[@]}"
  [ -n "$printing" ] || exec "${train[@]}"
  exit
fi
port="$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
pids=()
interrupted=
stop() { kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap 'interrupted=1; stop' TERM INT
for ((i = 0; i < processes; i++)); do
  settings=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes")
  settings+=("JAX_PROCESS_ID=$i" ${devices:+"JAX_LOCAL_DEVICE_IDS=$i"})
  if [ -n "$printing" ]; then
    run env "${settings[@]}" "${train[@]}"
    continue
  fi
  env "${settings[@]}" "${train[@]}" & # not a function: $! must be python, to receive signals
  pids+=($!)
done
[ -z "$printing" ] || exit 0
code=0
running="$processes"
while [ "$running" -gt 0 ]; do
  result=0
  wait -n || result=$?
  if [ -n "$interrupted" ] && [ "$result" -gt 128 ]; then
    interrupted= # the signal ended the wait, not a process: they are still saving
    continue
  fi
  running=$((running - 1))
  if [ "$result" != 0 ] && [ "$code" = 0 ]; then
    code="$result"
    [ "$code" = 75 ] || stop # the others cannot continue alone
  fi
done
exit "$code"
