"""Llama 3.1 8B (Dubey et al. 2024): Llama 3 for contexts of 131,072 tokens.

  python -m flaxlm.train --config=configs/llama3_1_8b.py --workdir=runs/llama3_1_8b

Not trained here: no result is claimed. Rows have 8192 tokens, as in most of its
training; llama3_1_8b_128k.py is its last stage.
"""

from . import llama3_8b


def get_config():
  config = llama3_8b.get_config()
  config.hardware = "v5e:16x16"
  model = config.model
  model.max_len = 131_072
  model.rope.scaling = "llama3"
  model.rope.factor = 8.0
  model.rope.original_max_len = 8192
  model.rope.low_frequency_factor = 1.0
  model.rope.high_frequency_factor = 4.0
  return config
