"""GPT-3 13B (Brown et al. 2020), for 64 devices.

  python -m flaxlm.train --config=configs/gpt3_13b.py --workdir=runs/gpt3_13b

Not trained here: no result is claimed. Table 2.1 prints a width of 5140, but 40 heads
of 128 and the 12,850M parameters of table D.1 imply 5120, as here. On 64n devices,
divide accumulation_steps by n.
"""

from . import gpt3_125m


def get_config():
  config = gpt3_125m.get_config()
  config.hardware = "v5p:4x4x4"
  config.num_steps = 143_000
  config.data.batch_size = 1024  # 2M tokens
  model = config.model
  model.num_layers = 40
  model.embed_dim = 5120
  model.num_heads = 40
  model.num_kv_heads = 40
  model.head_dim = 128
  model.mlp_dim = 20_480
  model.remat = "full"
  config.optim.peak_learning_rate = 1e-4
  config.optim.warmup_steps = 179
  config.mesh.fsdp = 64
  config.step.accumulation_steps = 8
  return config
