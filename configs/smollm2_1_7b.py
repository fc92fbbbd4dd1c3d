"""SmolLM2 1.7B (Ben Allal et al. 2025), for 8 devices.

  python -m flaxlm.train --config=configs/smollm2_1_7b.py --workdir=runs/smollm2_1_7b

Not trained here: no result is claimed. 11T tokens. On 8n devices, divide
accumulation_steps by n.
"""

from . import smollm2_135m


def get_config():
  config = smollm2_135m.get_config()
  config.hardware = "v6e:2x4"
  config.num_steps = 5_240_000
  config.data.batch_size = 1024
  model = config.model
  model.num_layers = 24
  model.embed_dim = 2048
  model.num_heads = 32
  model.num_kv_heads = 32
  model.mlp_dim = 8192
  model.rope.theta = 130_000.0
  model.remat = "full"
  config.optim.peak_learning_rate = 5e-4
  config.optim.decay_fraction = 0.1
  config.mesh.fsdp = 8
  config.step.accumulation_steps = 32
  return config
