"""Llama 3.2 3B (Meta 2024), for 8 devices.

  python -m flaxlm.train --config=configs/llama3_2_3b.py --workdir=runs/llama3_2_3b

Not trained here: no result is claimed.
"""

from . import llama3_2_1b


def get_config():
  config = llama3_2_1b.get_config()
  config.hardware = "v6e:2x4"
  model = config.model
  model.num_layers = 28
  model.embed_dim = 3072
  model.num_heads = 24
  model.head_dim = 128
  return config
