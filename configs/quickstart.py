"""A first model: 4 small layers on the Python standard library.

  bash launch/quickstart.sh
  python -m flaxlm.train --config=configs/quickstart.py --workdir=runs/quickstart

It takes 2 minutes on 2 CPU cores.
"""

from flaxlm.config import base


def get_config():
  config = base.get_config()
  config.hardware = "cpu"
  config.num_steps = 500
  config.data.store = "data/stdlib"
  config.data.seq_len = 128
  config.data.batch_size = 16
  config.data.validation_fraction = 0.05
  config.tokenizer.vocab_size = 2048
  config.tokenizer.train_bytes = 2_000_000
  config.model.num_layers = 4
  config.model.embed_dim = 128
  config.model.num_heads = 2
  config.model.num_kv_heads = 2
  config.model.mlp_dim = 352
  config.model.unroll = 4  # on a CPU, unrolled layers are faster than a loop
  config.optim.name = "muon"  # needs half of AdamW's steps at this size
  config.optim.peak_learning_rate = 1e-2
  config.optim.warmup_steps = 50
  config.eval.every = 250
  config.checkpoint.every = 250
  config.log.every = 25
  return config
