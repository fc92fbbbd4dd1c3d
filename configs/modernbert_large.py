"""ModernBERT large (Warner et al. 2024), first stage, for one GPU of 80 GB.

  python -m flaxlm.train --config=configs/modernbert_large.py \
    --workdir=runs/modernbert_large

Not trained here: no result is claimed. Theirs was lowered to a learning rate of 5e-5
after 900B tokens. On n devices, divide accumulation_steps by n.
"""

from . import modernbert_base


def get_config():
  config = modernbert_base.get_config()
  config.hardware = "v5e:2x2"
  config.num_steps = 337_000
  config.data.batch_size = 4928
  model = config.model
  model.num_layers = 28
  model.embed_dim = 1024
  model.num_heads = 16
  model.num_kv_heads = 16
  model.mlp_dim = 2624
  config.optim.peak_learning_rate = 5e-4
  config.optim.warmup_steps = 396  # 2B tokens
  config.optim.weight_decay = 1e-5 / 5e-4
  config.step.accumulation_steps = 308
  return config
