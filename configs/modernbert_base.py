"""ModernBERT base (Warner et al. 2024), first stage, for one GPU of 80 GB.

  python -m flaxlm.train --config=configs/modernbert_base.py \
    --workdir=runs/modernbert_base

Not trained here: no result is claimed. 1.7T tokens in rows of 1024, at a constant
learning rate. AdamW replaces StableAdamW, and there is no dropout (theirs: 0.1 after
attention). The global layers' rotary base is 160,000 from the start; theirs came with
rows of 8192 in a later stage. On n devices, divide accumulation_steps by n.
"""

from flaxlm.config import base


def get_config():
  config = base.get_config()
  config.hardware = "v5e:2x2"
  config.num_steps = 364_000
  config.tokenizer.vocab_size = 50_368
  config.tokenizer.train_bytes = 1_000_000_000
  config.data.store = "data/c4_modernbert"
  config.data.sources = base.sources(
    main=base.source("tfds", "c4/en", validation_split="validation")
  )
  config.data.seq_len = 1024
  config.data.batch_size = 4608
  config.objective.kind = "masked"
  config.objective.mask_rate = 0.3

  model = config.model
  model.max_len = 8192
  model.num_layers = 22
  model.embed_dim = 768
  model.num_heads = 12
  model.num_kv_heads = 12
  model.mlp_dim = 1152
  model.causal = False
  model.norm = "layernorm"
  model.first_norm = False
  model.embedding_norm = True
  model.activation = "gelu"
  model.sliding_window = 65  # itself and 64 on each side
  model.layer_pattern = ("global", "local", "local")
  model.rope.theta = 160_000.0
  model.rope.local_theta = 10_000.0
  model.head = "mlm"
  model.dtype = "bfloat16"
  model.remat = "dots"

  config.optim.peak_learning_rate = 8e-4
  config.optim.schedule = "constant"
  config.optim.warmup_steps = 636  # 3B tokens
  config.optim.weight_decay = 1e-5 / 8e-4  # theirs is not scaled by the rate
  config.optim.b2 = 0.98
  config.optim.epsilon = 1e-6
  config.step.accumulation_steps = 144
  return config
