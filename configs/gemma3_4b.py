"""Gemma 3 4B (Gemma Team 2025), its text model, for 8 devices.

  python -m flaxlm.train --config=configs/gemma3_4b.py --workdir=runs/gemma3_4b

Not trained here: no result is claimed. For contexts of 131,072 tokens, positions are
scaled in global layers. The embedding table has 64 rows more than the vocabulary.
"""

from . import gemma3_1b


def get_config():
  config = gemma3_1b.get_config()
  config.hardware = "v6e:2x4"
  model = config.model
  model.vocab_size = 262_208
  model.max_len = 131_072
  model.num_layers = 34
  model.embed_dim = 2560
  model.num_heads = 8
  model.num_kv_heads = 4
  model.mlp_dim = 10_240
  model.sliding_window = 1024
  model.rope.scaling = "linear"
  model.rope.factor = 8.0
  return config
