"""Qwen 2.5 0.5B (Qwen Team 2024), for one GPU of 80 GB.

  python -m flaxlm.train --config=configs/qwen2_5_0_5b.py --workdir=runs/qwen2_5_0_5b

Not trained here: no result is claimed. On n devices, divide accumulation_steps by n.
"""

from . import qwen2_5_7b


def get_config():
  config = qwen2_5_7b.get_config()
  config.hardware = "v5e:2x2"
  model = config.model
  model.vocab_size = 151_936
  model.max_len = 32_768
  model.num_layers = 24
  model.embed_dim = 896
  model.num_heads = 14
  model.num_kv_heads = 2
  model.head_dim = 64
  model.mlp_dim = 4864
  model.tie_embeddings = True
  config.mesh.fsdp = 1
  config.step.accumulation_steps = 256
  return config
