#!/usr/bin/env bash
# Train on this machine: one process for all its devices, or several that work together.
#   bash launch/local.sh --config=configs/quickstart.py --workdir=runs/a
#   bash launch/local.sh -n 2 --config=configs/quickstart.py --workdir=runs/a
# The exit code is that of the first process that failed: 75 means "run it again".
set -euo pipefail
source "$(dirname "$0")/environment.sh"
processes=1
if [ "${1:-}" = -n ]; then
  processes="$2"
  shift 2
fi
if [ "$processes" = 1 ]; then
  exec python -m flaxlm.train "$@"
fi
port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$processes"
pids=()
interrupted=
stop() { kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap 'interrupted=1; stop' TERM INT
for ((i = 0; i < processes; i++)); do
  JAX_PROCESS_ID="$i" python -m flaxlm.train "$@" &
  pids+=($!)
done
code=0
running="$processes"
while [ "$running" -gt 0 ]; do
  result=0
  wait -n || result=$?
  if [ -n "$interrupted" ] && [ "$result" -gt 128 ]; then
    interrupted= # the signal ended the wait, not a process: they are saving
    continue
  fi
  running=$((running - 1))
  if [ "$result" != 0 ] && [ "$code" = 0 ]; then
    code="$result"
    [ "$code" = 75 ] || stop # the others cannot go on alone
  fi
done
exit "$code"
