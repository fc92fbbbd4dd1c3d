#!/usr/bin/env bash
# Prints the tables of all benchmarks; their JSON goes to runs/bench/. See tests/benchmarks/.
#   bash launch/bench.sh [--quick] [--nanogpt CLONE] [--maxtext PYTHON] [--shakespeare FILE]
# It takes an hour or more. --quick takes 10 minutes and only shows that everything runs.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
quick=() nanogpt=() maxtext=() text=()
while [ $# -gt 0 ]; do
  case "$1" in
    --quick) quick=(--quick) && shift ;;
    --nanogpt) nanogpt=("--nanogpt=${2:?$1 needs a path}") && shift 2 ;;
    --maxtext) maxtext=("--maxtext=${2:?$1 needs a path}") && shift 2 ;;
    --shakespeare) text=("--text=${2:?$1 needs a file}") && shift 2 ;;
    *) echo "bench.sh: $1 is not --quick, --nanogpt CLONE, --maxtext PYTHON or --shakespeare FILE" >&2 && exit 2 ;;
  esac
done
mkdir -p runs/bench
failed=()
for name in train_speed gpu_speed shakespeare loss attention_speed first_step decoding data_speed scaling; do
  case "$name" in
    train_speed) more=("${quick[@]}" "${nanogpt[@]}" "${maxtext[@]}") ;;
    gpu_speed)
      command -v nvidia-smi >/dev/null || [ ${#quick[@]} -gt 0 ] || continue
      more=("${quick[@]}" "${nanogpt[@]}")
      ;;
    shakespeare)
      [ ${#text[@]} -gt 0 ] || continue
      more=("${text[@]}" "${nanogpt[@]}")
      ;;
    scaling) more=("${quick[@]}") ;;
    *) more=("${quick[@]/--quick/--turns=1}") ;;
  esac
  python "tests/benchmarks/$name.py" --json="runs/bench/$name.json" "${more[@]}" || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
