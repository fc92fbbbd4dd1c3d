"""BERT large (Devlin et al. 2018), for one GPU.

  python -m flaxlm.train --config=configs/bert_large.py --workdir=runs/bert_large

Not trained here: no result is claimed. On n devices, divide accumulation_steps by n.
"""

from . import bert_base


def get_config():
  config = bert_base.get_config()
  config.hardware = "v5e:2x2"
  model = config.model
  model.num_layers = 24
  model.embed_dim = 1024
  model.num_heads = 16
  model.num_kv_heads = 16
  model.mlp_dim = 4096
  config.step.accumulation_steps = 16
  return config
