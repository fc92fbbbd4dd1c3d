"""Qwen 3 30B-A3B (Yang et al. 2025): 8 of 128 experts a token, for 128 TPUs v5p.

  python -m flaxlm.train --config=configs/qwen3_30b_a3b.py --workdir=runs/qwen3_30b_a3b

Not trained here: no result is claimed. 30.5B parameters, 3.3B of them for a token.
"""

from . import qwen3_8b


def get_config():
  config = qwen3_8b.get_config()
  config.hardware = "v5p:4x4x8"
  model = config.model
  model.num_layers = 48
  model.embed_dim = 2048
  model.num_kv_heads = 4
  model.mlp_dim = 6144  # of no layer: all have experts
  model.moe.num_experts = 128
  model.moe.experts_per_token = 8
  model.moe.expert_dim = 768
  model.moe.aux_loss = 1e-3 / 48  # theirs is a mean over layers, ours a sum
  # Found by `plan --search`: whole experts gathered, layer by layer, cost these links
  # less than tokens sent to experts that may all be on one device.
  config.mesh.fsdp = 64
  config.mesh.tensor = 2
  config.step.accumulation_steps = 16
  model.remat = "none"
  return config
