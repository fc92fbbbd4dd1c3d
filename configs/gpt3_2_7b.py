"""GPT-3 2.7B (Brown et al. 2020), for 8 devices.

  python -m flaxlm.train --config=configs/gpt3_2_7b.py --workdir=runs/gpt3_2_7b

Not trained here: no result is claimed. On 8n devices, divide accumulation_steps by n.
"""

from . import gpt3_125m


def get_config():
  config = gpt3_125m.get_config()
  config.hardware = "v6e:2x4"
  config.num_steps = 286_000
  config.data.batch_size = 512  # 1M tokens
  model = config.model
  model.num_layers = 32
  model.embed_dim = 2560
  model.num_heads = 32
  model.num_kv_heads = 32
  model.head_dim = 80
  model.mlp_dim = 10_240
  model.remat = "full"
  config.optim.peak_learning_rate = 1.6e-4
  config.optim.warmup_steps = 358
  config.mesh.fsdp = 8
  config.step.accumulation_steps = 32
  return config
