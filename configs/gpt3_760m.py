"""GPT-3 large (Brown et al. 2020): 760M parameters, for one GPU of 80 GB.

  python -m flaxlm.train --config=configs/gpt3_760m.py --workdir=runs/gpt3_760m

Not trained here: no result is claimed. On n devices, divide accumulation_steps by n.
"""

from . import gpt3_125m


def get_config():
  config = gpt3_125m.get_config()
  config.hardware = "h100x1"
  model = config.model
  model.num_layers = 24
  model.embed_dim = 1536
  model.num_heads = 16
  model.num_kv_heads = 16
  model.head_dim = 96
  model.mlp_dim = 6144
  config.optim.peak_learning_rate = 2.5e-4
  config.step.accumulation_steps = 128
  return config
