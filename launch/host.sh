#!/usr/bin/env bash
# Starts one host's share of a run, for tpu_vm.sh and sky.yaml, which have no scheduler.
#   bash launch/host.sh HARDWARE SLICES TRAINING ARGUMENTS
# runs/host.status holds "running", then the exit code. runs/host.pid holds the process to
# signal. runs/.secrets, if it exists, holds NAME=VALUE lines for the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs
echo "$$" >runs/host.pid
echo running >runs/host.status
trap 'echo "$?" >runs/host.status' EXIT
if [ -f runs/.secrets ]; then
  while IFS= read -r line; do
    export "${line?}"
  done <runs/.secrets
fi
source launch/environment.sh
source launch/xla_flags.sh "$1" "$2"
shift 2
python -m flaxlm.supervise -- python -m flaxlm.train "$@" &
child="$!"
trap 'kill -TERM "$child"' TERM INT
while kill -0 "$child" 2>/dev/null; do # a signal ends the wait, not the child
  code=0
  wait "$child" || code=$?
done
exit "$code"
