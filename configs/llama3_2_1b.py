"""Llama 3.2 1B (Meta 2024), for 8 devices.

  python -m flaxlm.train --config=configs/llama3_2_1b.py --workdir=runs/llama3_2_1b

Not trained here: no result is claimed. Meta pruned it from the 8B model and distilled
it; this config trains from scratch. On 8n devices, divide accumulation_steps by n.
"""

from . import llama3_1_8b


def get_config():
  config = llama3_1_8b.get_config()
  config.hardware = "v6e:2x4"
  model = config.model
  model.num_layers = 16
  model.embed_dim = 2048
  model.head_dim = 64
  model.mlp_dim = 8192
  model.tie_embeddings = True
  model.rope.factor = 32.0
  config.mesh.data = -1
  config.mesh.fsdp = 8
  config.step.accumulation_steps = 64
  return config
