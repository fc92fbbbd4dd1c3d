#!/usr/bin/env bash
# From a fresh clone to a trained model: set up, prepare text, train, evaluate, sample.
# Arguments go to flaxlm.train, for example --config.num_steps=1000. With --serve first,
# the model is then served: an API and a page, until Ctrl-C.
set -euo pipefail
serve=no
case "${1:-}" in
  --serve) serve=yes; shift ;;
esac
source "$(dirname "$0")/environment.sh"
run=runs/quickstart
python -m flaxlm.prepare --config=configs/quickstart.py
python -m flaxlm.train --config=configs/quickstart.py --workdir="$run" "$@"
python -m flaxlm.evaluate --workdir="$run"
echo "a sample:"
python -m flaxlm.generate --workdir="$run" --prompt="def " --max_tokens=120
cat <<END

everything is in $run:
  checkpoints/   the model, by step          metrics.jsonl   every logged number
  config.json    all settings of the run     tensorboard/    curves
train longer:  bash launch/quickstart.sh --config.num_steps=2000
write more:    python -m flaxlm.generate --workdir=$run --prompt="class "
serve it:      python -m flaxlm.serve --workdir=$run
END
if [ "$serve" = yes ]; then
  python -c 'import starlette, uvicorn' 2>/dev/null ||
    python -m pip install --quiet --disable-pip-version-check -e ".[serve]"
  exec python -m flaxlm.serve --workdir="$run"
fi
