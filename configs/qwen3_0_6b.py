"""Qwen 3 0.6B (Yang et al. 2025), for one GPU of 80 GB.

  python -m flaxlm.train --config=configs/qwen3_0_6b.py --workdir=runs/qwen3_0_6b

Not trained here: no result is claimed. On n devices, divide accumulation_steps by n.
"""

from . import qwen3_8b


def get_config():
  config = qwen3_8b.get_config()
  config.hardware = "v5e:2x2"
  model = config.model
  model.num_layers = 28
  model.embed_dim = 1024
  model.num_heads = 16
  model.mlp_dim = 3072
  model.tie_embeddings = True
  config.mesh.fsdp = 1
  config.step.accumulation_steps = 256
  return config
