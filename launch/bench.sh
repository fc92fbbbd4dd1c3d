#!/usr/bin/env bash
# Training speed for three sizes against a matrix product; see tests/benchmarks/.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
python tests/benchmarks/train_speed.py "$@"
