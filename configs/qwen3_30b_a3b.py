"""Qwen 3 30B-A3B (Yang et al. 2025): 8 of 128 experts per token, for 128 TPUs v5p.

  python -m flaxlm.train --config=configs/qwen3_30b_a3b.py --workdir=runs/qwen3_30b_a3b

Not trained here: no result is claimed. 30.5B parameters, of which 3.3B are active per
token.
"""

from . import qwen3_8b


def get_config():
  config = qwen3_8b.get_config()
  config.hardware = "v5p:4x4x8"
  model = config.model
  model.num_layers = 48
  model.embed_dim = 2048
  model.num_kv_heads = 4
  model.mlp_dim = 6144  # unused: all layers have experts
  model.moe.num_experts = 128
  model.moe.experts_per_token = 8
  model.moe.expert_dim = 768
  model.moe.aux_loss = 1e-3 / 48  # theirs averages over layers, ours sums
  # Found by `plan --search`: on these links, gathering whole experts layer by layer is
  # cheaper than sending tokens to experts that may all be on one device.
  config.mesh.fsdp = 64
  config.mesh.tensor = 2
  config.step.accumulation_steps = 16
  model.remat = "none"
  return config
