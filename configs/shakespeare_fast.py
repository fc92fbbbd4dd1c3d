"""Tiny Shakespeare by characters, as fast as flaxlm can: shakespeare_char's data,
split, row length, metric and size, but with another block, Muon and another schedule.

  python -m flaxlm.prepare --config=configs/shakespeare_fast.py \
    --config.data.sources.main.path=FILE
  python -m flaxlm.train --config=configs/shakespeare_fast.py \
    --workdir=runs/shakespeare_fast
"""

from . import shakespeare_char


def get_config():
  config = shakespeare_char.get_config()
  model = config.model
  model.positions = "rope"
  model.norm = "rmsnorm"
  model.activation = "relu"

  optim = config.optim
  optim.name = "muon"
  optim.peak_learning_rate = 1e-2
  optim.schedule = "linear"
  optim.warmup_steps = 20
  optim.end_factor = 0.0
  return config
