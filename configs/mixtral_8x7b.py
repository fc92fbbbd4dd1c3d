"""Mixtral 8x7B (Jiang et al. 2024): 2 of 8 experts per token, for 128 TPUs v5p.

  python -m flaxlm.train --config=configs/mixtral_8x7b.py --workdir=runs/mixtral_8x7b

Not trained here: no result is claimed. 46.7B parameters, of which 12.9B are active per
token. Its training was not published; the settings are Llama 2's, with Switch
Transformer's weight for the balancing loss.
"""

from . import mistral_7b


def get_config():
  config = mistral_7b.get_config()
  config.hardware = "v5p:4x4x8"
  model = config.model
  model.sliding_window = 0
  model.rope.theta = 1_000_000.0
  model.moe.num_experts = 8
  model.moe.experts_per_token = 2
  config.mesh.fsdp = 16
  config.mesh.expert = 8
  config.step.accumulation_steps = 4
  return config
