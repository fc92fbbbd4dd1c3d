"""Llama 3.1 8B on rows of 131,072 tokens, for 256 TPUs v5p.

  python -m flaxlm.train --config=configs/llama3_1_8b_128k.py \\
    --config.init_from=runs/llama3_1_8b --workdir=runs/llama3_1_8b_128k

Not trained here: no result is claimed. This is the last stage of its training (Dubey
et al. 2024). Ring attention splits each row over 16 chips.
"""

from . import llama3_1_8b


def get_config():
  config = llama3_1_8b.get_config()
  config.hardware = "v5p:4x8x8"
  config.num_steps = 800
  config.data.seq_len = 131_072
  config.data.batch_size = 32
  config.model.attention = "ring"
  config.optim.peak_learning_rate = 1e-5
  config.optim.warmup_steps = 100
  config.mesh.fsdp = 16
  config.mesh.context = 16
  config.step.accumulation_steps = 2
  return config
