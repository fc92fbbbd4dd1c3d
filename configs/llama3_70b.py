"""Llama 3 70B (Dubey et al. 2024), for 1,024 TPUs v5p.

  python -m flaxlm.train --config=configs/llama3_70b.py --workdir=runs/llama3_70b

Not trained here: no result is claimed.
"""

from . import llama3_8b


def get_config():
  config = llama3_8b.get_config()
  config.hardware = "v5p:8x8x16"
  model = config.model
  model.num_layers = 80
  model.embed_dim = 8192
  model.num_heads = 64
  model.mlp_dim = 28_672
  config.optim.peak_learning_rate = 1.5e-4
  config.mesh.fsdp = 128
  config.mesh.tensor = 8
  config.step.accumulation_steps = 2
  return config
