#!/usr/bin/env bash
# Runs the test suite in the same environment as quickstart.sh; arguments go to pytest.
# One worker more than there are cores, since some tests wait for processes that they start.
# Each starts with a consecutive share of the tests and then takes some from slower workers,
# so that what a file prepares is mostly prepared once.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
python -c 'import argcomplete, pytest, xdist' 2>/dev/null ||
  python -m pip install --quiet --disable-pip-version-check -e ".[test]"
workers=$(python -c 'import psutil; print(psutil.cpu_count() + 1)')
python -m pytest -n "$workers" --dist worksteal "$@"
