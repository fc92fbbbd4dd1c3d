"""GPT-2 large (Radford et al. 2019): 774M parameters, for 4 devices.

  python -m flaxlm.train --config=configs/gpt2_774m.py --workdir=runs/gpt2_774m

Not trained here: no result is claimed. On 4n devices, divide accumulation_steps by n.
"""

from . import gpt2_124m


def get_config():
  config = gpt2_124m.get_config()
  config.hardware = "v5e:2x2"
  model = config.model
  model.num_layers = 36
  model.embed_dim = 1280
  model.num_heads = 20
  model.num_kv_heads = 20
  model.mlp_dim = 5120
  config.optim.peak_learning_rate = 2.5e-4
  config.mesh.fsdp = 4
  config.step.accumulation_steps = 32
  return config
