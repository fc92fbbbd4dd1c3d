#!/usr/bin/env bash
# The tables of all benchmarks, with JSON beside them in runs/bench/; see tests/benchmarks/.
#   bash launch/bench.sh [--quick] [--nanogpt CLONE] [--maxtext PYTHON]
# Quick ones take 3 minutes and show no more than that everything runs.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
quick=() speed=()
while [ $# -gt 0 ]; do
  case "$1" in
    --quick) quick=(--quick) && shift ;;
    --nanogpt | --maxtext) speed+=("$1" "${2:?$1 needs a path}") && shift 2 ;;
    *) echo "bench.sh: $1 is not --quick, --nanogpt CLONE or --maxtext PYTHON" >&2 && exit 2 ;;
  esac
done
mkdir -p runs/bench
failed=()
for name in train_speed loss first_step decoding data_speed scaling; do
  [ -e "tests/benchmarks/$name.py" ] || continue
  case "$name" in
    train_speed) more=("${quick[@]}" "${speed[@]}") ;;
    scaling) more=("${quick[@]}") ;;
    *) more=("${quick[@]/--quick/--turns=1}") ;;
  esac
  python "tests/benchmarks/$name.py" --json="runs/bench/$name.json" "${more[@]}" || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
