#!/usr/bin/env bash
# From a fresh clone to a trained model: set up, prepare text, train, evaluate, sample.
# Arguments go to flaxlm.train, for example --config.num_steps=1000.
set -euo pipefail
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
END
