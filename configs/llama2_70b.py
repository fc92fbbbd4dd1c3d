"""Llama 2 70B (Touvron et al. 2023): grouped-query attention, for 2 × 512 TPUs v5p.

  python -m flaxlm.train --config=configs/llama2_70b.py --workdir=runs/llama2_70b

Not trained here: no result is claimed.
"""

from . import llama2_7b


def get_config():
  config = llama2_7b.get_config()
  config.hardware = "2xv5p:8x8x8"
  model = config.model
  model.num_layers = 80
  model.embed_dim = 8192
  model.num_heads = 64
  model.num_kv_heads = 8
  model.mlp_dim = 28_672
  config.optim.peak_learning_rate = 1.5e-4
  config.mesh.slice = 2
  config.mesh.fsdp = 512
  config.step.accumulation_steps = 1
  return config
