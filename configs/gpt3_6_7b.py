"""GPT-3 6.7B (Brown et al. 2020), for 64 devices.

  python -m flaxlm.train --config=configs/gpt3_6_7b.py --workdir=runs/gpt3_6_7b

Not trained here: no result is claimed. On 64n devices, divide accumulation_steps by n.
"""

from . import gpt3_125m


def get_config():
  config = gpt3_125m.get_config()
  config.hardware = "v5p:4x4x4"
  config.num_steps = 143_000
  config.data.batch_size = 1024  # 2M tokens
  model = config.model
  model.num_layers = 32
  model.embed_dim = 4096
  model.num_heads = 32
  model.num_kv_heads = 32
  model.head_dim = 128
  model.mlp_dim = 16_384
  model.remat = "full"
  config.optim.peak_learning_rate = 1.2e-4
  config.optim.warmup_steps = 179
  config.mesh.fsdp = 64
  config.step.accumulation_steps = 4
  return config
