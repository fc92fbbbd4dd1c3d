"""GPT-2 medium (Radford et al. 2019): 355M parameters, for one GPU.

  python -m flaxlm.train --config=configs/gpt2_355m.py --workdir=runs/gpt2_355m

Not trained here: no result is claimed. GPT-2's learning rates were not published;
this is GPT-3's at that size. On n devices, divide accumulation_steps by n.
"""

from . import gpt2_124m


def get_config():
  config = gpt2_124m.get_config()
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
