"""BERT tiny (Turc et al. 2019): 2 layers of width 128, for a CPU or any GPU.

  python -m flaxlm.train --config=configs/bert_tiny.py --workdir=runs/bert_tiny

Not trained here: no result is claimed. Everything else is as in configs/bert_base.py.
"""

from . import bert_base


def get_config():
  config = bert_base.get_config()
  config.hardware = "v5e:2x2"
  model = config.model
  model.num_layers = 2
  model.embed_dim = 128
  model.num_heads = 2
  model.num_kv_heads = 2
  model.mlp_dim = 512
  return config
