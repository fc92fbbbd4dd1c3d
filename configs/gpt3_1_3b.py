"""GPT-3 XL (Brown et al. 2020): 1.3B parameters, for 8 devices.

  python -m flaxlm.train --config=configs/gpt3_1_3b.py --workdir=runs/gpt3_1_3b

Not trained here: no result is claimed. Table 2.1 prints 24 heads of 128, which would be
1.5B parameters; the 1,320M of table D.1 imply 16 heads, as here. On 8n devices, divide
accumulation_steps by n.
"""

from . import gpt3_125m


def get_config():
  config = gpt3_125m.get_config()
  config.hardware = "v6e:2x4"
  config.num_steps = 286_000
  config.data.batch_size = 512  # 1M tokens
  model = config.model
  model.num_layers = 24
  model.embed_dim = 2048
  model.num_heads = 16
  model.num_kv_heads = 16
  model.head_dim = 128
  model.mlp_dim = 8192
  model.remat = "full"
  config.optim.peak_learning_rate = 2e-4
  config.optim.warmup_steps = 358
  config.mesh.fsdp = 8
  config.step.accumulation_steps = 16
  return config
