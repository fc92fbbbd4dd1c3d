"""A first model: 4 layers on the Python standard library, about 2 minutes on 2 CPU cores.

  bash launch/quickstart.sh
  python -m flaxlm.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from configs import base


def get_config():
  config = base.get_config()
  config.num_steps = 400
  config.data.store = "data/stdlib"
  config.data.seq_len = 128
  config.data.batch_size = 16
  config.data.sources.main.kind = "stdlib"
  config.tokenizer.vocab_size = 4096
  config.tokenizer.train_bytes = 2_000_000
  config.model.num_layers = 4
  config.model.embed_dim = 256
  config.model.num_heads = 4
  config.model.num_kv_heads = 4
  config.model.mlp_dim = 704
  config.model.unroll = 4
  config.optim.peak_learning_rate = 3e-3
  config.optim.warmup_steps = 40
  config.eval.every = 200
  config.checkpoint.every = 200
  return config
