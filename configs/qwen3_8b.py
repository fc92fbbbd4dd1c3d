"""Qwen 3 8B (Yang et al. 2025), for 64 devices.

  python -m flaxlm.train --config=configs/qwen3_8b.py --workdir=runs/qwen3_8b

Not trained here: no result is claimed. Qwen 2.5's architecture with QK-norm instead of
biases. Its optimizer settings were not published; these are Llama 2's.
"""

from . import qwen2_5_7b


def get_config():
  config = qwen2_5_7b.get_config()
  config.hardware = "v5p:4x4x4"
  config.tokenizer.vocab_size = 151_669
  config.data.store = "data/c4_qwen3"
  model = config.model
  model.vocab_size = 151_936
  model.max_len = 40_960
  model.num_layers = 36
  model.embed_dim = 4096
  model.num_heads = 32
  model.num_kv_heads = 8
  model.mlp_dim = 12_288
  model.qkv_bias = False
  model.qk_norm = "head"
  return config
