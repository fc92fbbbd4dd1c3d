#!/usr/bin/env bash
# The whole test suite, in the same environment as quickstart.sh; arguments go to pytest.
# One worker per core. Each begins with half of the tests and takes over from the other
# when it is done, so that what a file prepares is mostly prepared once.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
python -c 'import argcomplete, pytest, xdist' 2>/dev/null ||
  python -m pip install --quiet --disable-pip-version-check -e ".[test]"
python -m pytest -n logical --dist worksteal "$@"
