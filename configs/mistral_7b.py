"""Mistral 7B v0.1 (Jiang et al. 2023), for 64 devices.

  python -m flaxlm.train --config=configs/mistral_7b.py --workdir=runs/mistral_7b

Not trained here: no result is claimed. Llama 2's architecture with grouped-query
attention and a sliding window of 4096 tokens. Its training was not published; the
settings are Llama 2's.
"""

from . import llama2_7b


def get_config():
  config = llama2_7b.get_config()
  config.hardware = "v5p:4x4x4"
  config.data.store = "data/c4_mistral"
  config.data.seq_len = 8192
  config.data.batch_size = 512
  model = config.model
  model.max_len = 32_768
  model.num_kv_heads = 8
  model.mlp_dim = 14_336
  model.sliding_window = 4096
  return config
