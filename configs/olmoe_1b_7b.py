"""OLMoE 1B-7B (Muennighoff et al. 2024): 8 of 64 experts per token, for 64 devices.

  python -m flaxlm.train --config=configs/olmoe_1b_7b.py --workdir=runs/olmoe_1b_7b

Not trained here: no result is claimed. 6.9B parameters, of which 1.3B are active per
token. The published settings; the weights of the chosen experts do not sum to 1.
"""

from . import olmo2_1b


def get_config():
  config = olmo2_1b.get_config()
  config.hardware = "v5p:4x4x4"
  config.num_steps = 1_192_000
  config.tokenizer.vocab_size = 50_280
  config.data.store = "data/c4_olmoe"
  config.data.batch_size = 1024
  model = config.model
  model.vocab_size = 50_304
  model.norm_epsilon = 1e-5
  model.norm_placement = "pre"
  model.rope.theta = 10_000.0
  model.mlp_dim = 1024
  model.moe.num_experts = 64
  model.moe.experts_per_token = 8
  model.moe.renormalize = False
  # Theirs average over 16 layers and 8 choices, ours sum.
  model.moe.aux_loss = 0.01 / (16 * 8)
  model.moe.z_loss = 0.001 / (16 * 8)
  config.optim.warmup_steps = 2500
  config.mesh.fsdp = 64
  config.step.z_loss = 0.0
  config.step.accumulation_steps = 8
  return config
