#!/usr/bin/env bash
# Train on any cloud through SkyPilot; the job is launch/sky.yaml.
#   bash launch/sky.sh [--print] NAME [OPTIONS OF `sky jobs launch`] -- TRAINING ARGUMENTS
# Then: sky jobs queue, sky jobs logs --name NAME, sky jobs cancel --name NAME
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
if [ "${1:-}" = --print ]; then
  printing=1
  shift
fi
need NAME "${1:-}" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?'
options=(--name "$1" --yes)
shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  options+=("$1")
  shift
done
[ $# -gt 1 ] || refuse "needed: -- and the training arguments, after sky's options"
shift
for name in "${secrets[@]}"; do # only the name: sky reads the value from the environment
  [ -z "${!name:-}" ] || options+=(--secret "$name")
done
run sky jobs launch "${options[@]}" --env "ARGUMENTS=$(quote "$@")" launch/sky.yaml
