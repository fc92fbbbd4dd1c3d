"""GPT-2 XL (Radford et al. 2019): 1,558M parameters, for 8 devices.

  python -m flaxlm.train --config=configs/gpt2_1_5b.py --workdir=runs/gpt2_1_5b

Not trained here: no result is claimed. On 8n devices, divide accumulation_steps by n.
"""

from . import gpt2_124m


def get_config():
  config = gpt2_124m.get_config()
  config.hardware = "v6e:2x4"
  model = config.model
  model.num_layers = 48
  model.embed_dim = 1600
  model.num_heads = 25
  model.num_kv_heads = 25
  model.mlp_dim = 6400
  model.remat = "full"
  config.optim.peak_learning_rate = 2e-4
  config.mesh.fsdp = 8
  config.step.accumulation_steps = 16
  return config
