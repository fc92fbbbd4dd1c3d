"""Llama 2 13B (Touvron et al. 2023), for 64 devices.

  python -m flaxlm.train --config=configs/llama2_13b.py --workdir=runs/llama2_13b

Not trained here: no result is claimed.
"""

from . import llama2_7b


def get_config():
  config = llama2_7b.get_config()
  config.hardware = "v5p:4x4x4"
  model = config.model
  model.num_layers = 40
  model.embed_dim = 5120
  model.num_heads = 40
  model.num_kv_heads = 40
  model.mlp_dim = 13_824
  return config
