"""nanoGPT's published CPU setting: tiny Shakespeare by characters, 2,000 steps.

  python -m flaxlm.prepare --config=configs/shakespeare_char.py \
    --config.data.sources.main.path=FILE
  python -m flaxlm.train --config=configs/shakespeare_char.py \
    --workdir=runs/shakespeare_char

The text is github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt (1,115,394
bytes); the first 90% is for training. nanoGPT publishes a validation loss of 1.88 nats
per character.
"""

from flaxlm.config import base


def get_config():
  config = base.get_config()
  config.hardware = "cpu"
  config.seed = 1337
  config.num_steps = 2000
  data = config.data
  data.store = "data/shakespeare_char"
  data.seq_len = 64
  data.batch_size = 12
  data.sources = base.sources(main=base.source("text", "shakespeare.txt"))
  data.split = "tail"
  data.validation_fraction = 0.1
  config.tokenizer.kind = "char"
  config.tokenizer.vocab_size = 96
  config.tokenizer.byte_fallback = False

  model = config.model
  model.num_layers = 4
  model.embed_dim = 128
  model.num_heads = 4
  model.num_kv_heads = 4
  model.head_dim = 32
  model.mlp_dim = 512
  model.positions = "learned"
  model.norm = "layernorm"
  model.gated_mlp = False
  model.activation = "gelu_tanh"
  model.unroll = 4

  optim = config.optim
  optim.peak_learning_rate = 4e-3  # nanoGPT: 1e-3, which ends at 1.89 here
  optim.warmup_steps = 100
  optim.end_factor = 0.1
  optim.b2 = 0.99
  config.eval.every = 250
  config.checkpoint.every = 1000
  return config
