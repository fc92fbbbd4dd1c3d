"""GPT-3 medium (Brown et al. 2020): 350M parameters, for one GPU.

  python -m flaxlm.train --config=configs/gpt3_350m.py --workdir=runs/gpt3_350m

Not trained here: no result is claimed. On n devices, divide accumulation_steps by n.
"""

from . import gpt3_125m


def get_config():
  config = gpt3_125m.get_config()
  config.hardware = "v5e:2x2"
  model = config.model
  model.num_layers = 24
  model.embed_dim = 1024
  model.num_heads = 16
  model.num_kv_heads = 16
  model.mlp_dim = 4096
  config.optim.peak_learning_rate = 3e-4
  config.step.accumulation_steps = 64
  return config
