"""SmolLM2 360M (Ben Allal et al. 2025), for one GPU.

  python -m flaxlm.train --config=configs/smollm2_360m.py --workdir=runs/smollm2_360m

Not trained here: no result is claimed. On n devices, divide accumulation_steps by n.
"""

from . import smollm2_135m


def get_config():
  config = smollm2_135m.get_config()
  config.hardware = "v5e:2x2"
  config.num_steps = 2_600_000
  config.data.batch_size = 768
  model = config.model
  model.num_layers = 32
  model.embed_dim = 960
  model.num_heads = 15
  model.num_kv_heads = 5
  model.mlp_dim = 2560
  config.step.accumulation_steps = 96
  return config
