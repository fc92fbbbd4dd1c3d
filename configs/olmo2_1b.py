"""OLMo 2 1B (OLMo Team 2025), first stage, for 8 devices.

  python -m flaxlm.train --config=configs/olmo2_1b.py --workdir=runs/olmo2_1b

Not trained here: no result is claimed. On 8n devices, divide accumulation_steps by n.
"""

from . import olmo2_7b


def get_config():
  config = olmo2_7b.get_config()
  config.hardware = "v6e:2x4"
  config.num_steps = 2_384_000
  config.data.batch_size = 512
  model = config.model
  model.num_layers = 16
  model.embed_dim = 2048
  model.num_heads = 16
  model.num_kv_heads = 16
  model.mlp_dim = 8192
  config.optim.peak_learning_rate = 4e-4
  config.optim.warmup_steps = 4000
  config.mesh.fsdp = 8
  config.step.accumulation_steps = 16
  return config
