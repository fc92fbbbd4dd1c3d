#!/usr/bin/env bash
# The whole test suite, in the same environment as quickstart.sh; arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
python -m pytest "$@"
