# Sourced by the other scripts: makes a virtual environment in the clone and installs flaxlm.
# If an environment is already active, uses that and installs only what is missing.
# shellcheck shell=bash
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    for python in python3 python python3.13 python3.12 python3.11 none; do
      "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    if [ "$python" = none ]; then
      echo "flaxlm needs Python 3.11 or newer; found $(python3 --version 2>&1)" >&2
      exit 2
    fi
    echo "making a virtual environment in .venv"
    "$python" -m venv .venv
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
stamp="$VIRTUAL_ENV/.flaxlm-installed"
if ! cmp -s setup.py "$stamp" || ! python -c 'import flaxlm' 2>/dev/null; then
  echo "installing flaxlm and its dependencies into $VIRTUAL_ENV (a minute or two)"
  python -m pip install --quiet --disable-pip-version-check -e .
  cp setup.py "$stamp"
fi
