"""A small BERT for CPUs: 4 layers, masked tokens of your own text.

  python -m flaxlm.prepare --config=configs/bert_mini.py \\
    --config.data.sources.main.path='texts/*.txt'
  python -m flaxlm.train --config=configs/bert_mini.py --workdir=runs/bert_mini

BERT's task and head (Devlin et al. 2018) with later improvements: no sentence pairs,
new masks each epoch (RoBERTa, Liu et al. 2019), 30% masked (Wettig et al. 2022),
packed rows, norms before the blocks and rotary positions (ModernBERT).
"""

from flaxlm.config import base


def get_config():
  config = base.get_config()
  config.hardware = "cpu"
  config.num_steps = 2500
  config.data.store = "data/bert_mini"
  config.data.sources = base.sources(main=base.source("text", "", document="paragraph"))
  config.data.seq_len = 128
  config.data.batch_size = 16
  config.data.validation_fraction = 0.03
  config.tokenizer.kind = "unigram"
  config.tokenizer.vocab_size = 4096
  config.objective.kind = "masked"
  config.objective.mask_rate = 0.3
  config.objective.mask_unit = "word"

  model = config.model
  model.causal = False
  model.num_layers = model.unroll = 4
  model.embed_dim = 128
  model.num_heads = model.num_kv_heads = 2
  model.mlp_dim = 352
  model.activation = "gelu"
  model.head = "mlm"

  optim = config.optim
  optim.name = "muon"
  optim.peak_learning_rate = 1e-2
  optim.warmup_steps = 100
  config.eval.every = 500
  config.checkpoint.every = 500
  config.log.every = 50
  return config
