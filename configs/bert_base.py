"""BERT base (Devlin et al. 2018): masked tokens and next sentences, for one GPU.

  python -m flaxlm.train --config=configs/bert_base.py --workdir=runs/bert_base

Not trained here: no result is claimed. The published settings, except that all rows
have 512 tokens (the original had 128 for 90% of the steps) and the text is Wikipedia
alone (the books are no longer available). The tokenizer trained here is not WordPiece;
--config.tokenizer.path takes the original. On n devices, divide accumulation_steps
by n.
"""

from flaxlm.config import base


def get_config():
  config = base.get_config()
  config.hardware = "v5e:2x2"
  config.num_steps = 1_000_000
  config.tokenizer.vocab_size = 30_522
  config.tokenizer.train_bytes = 1_000_000_000
  config.data.store = "data/wikipedia_bert"
  config.data.sources = base.sources(main=base.source("tfds", "wikipedia/20230601.en"))
  config.data.seq_len = 512
  config.data.batch_size = 256
  config.objective.kind = "masked"
  config.objective.pairs = "nsp"

  model = config.model
  model.num_layers = 12
  model.embed_dim = 768
  model.num_heads = 12
  model.num_kv_heads = 12
  model.mlp_dim = 3072
  model.causal = False
  model.positions = "learned"
  model.norm = "layernorm"
  model.norm_epsilon = 1e-12
  model.norm_placement = "residual"
  model.embedding_norm = True
  model.num_segment_types = 2
  model.gated_mlp = False
  model.activation = "gelu"
  model.use_bias = True
  model.head = "mlm"
  model.pair_head = True
  model.dropout = 0.1
  model.dtype = "bfloat16"
  model.remat = "dots"

  config.optim.peak_learning_rate = 1e-4
  config.optim.schedule = "linear"
  config.optim.end_factor = 0.0
  config.optim.warmup_steps = 10_000
  config.optim.weight_decay = 0.01
  config.optim.b2 = 0.999
  config.optim.epsilon = 1e-6
  config.step.accumulation_steps = 8
  return config
