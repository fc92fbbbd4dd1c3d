"""Gemma 2 9B (Gemma Team 2024), for 64 devices.

  python -m flaxlm.train --config=configs/gemma2_9b.py --workdir=runs/gemma2_9b

Not trained here: no result is claimed. On 64n devices, divide accumulation_steps by n.
"""

from . import gemma2_2b


def get_config():
  config = gemma2_2b.get_config()
  config.hardware = "v5p:4x4x4"
  model = config.model
  model.num_layers = 42
  model.embed_dim = 3584
  model.num_heads = 16
  model.num_kv_heads = 8
  model.mlp_dim = 14_336
  config.mesh.fsdp = 64
  config.step.accumulation_steps = 8
  return config
