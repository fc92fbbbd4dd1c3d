#!/usr/bin/env bash
# The whole test suite, in the same environment as quickstart.sh; arguments go to pytest.
# One worker a core, and files whole, so that what a file prepares is prepared once.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
python -c 'import argcomplete, pytest, xdist' 2>/dev/null ||
  python -m pip install --quiet --disable-pip-version-check -e ".[test]"
python -m pytest -n logical --dist loadfile "$@"
