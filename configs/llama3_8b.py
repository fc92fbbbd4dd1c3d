"""Llama 3 8B (Dubey et al. 2024), for 256 TPUs v5e.

  python -m flaxlm.train --config=configs/llama3_8b.py --workdir=runs/llama3_8b

Not trained here: no result is claimed. --config.tokenizer.path takes its tokenizer.
"""

from flaxlm.config import base


def get_config():
  config = base.get_config()
  config.hardware = "v5e:16x16"
  config.num_steps = 500_000
  config.tokenizer.vocab_size = 128_256
  config.data.store = "data/c4_llama3"
  config.data.sources = base.sources(
    main=base.source("tfds", "c4/en", validation_split="validation")
  )
  config.data.seq_len = 8192
  config.data.batch_size = 512

  model = config.model
  model.num_layers = 32
  model.embed_dim = 4096
  model.num_heads = 32
  model.num_kv_heads = 8
  model.head_dim = 128
  model.mlp_dim = 14_336
  model.rope.theta = 500_000.0
  model.tie_embeddings = False
  model.dtype = "bfloat16"
  model.remat = "full"

  config.optim.peak_learning_rate = 3e-4
  config.optim.warmup_steps = 2000
  config.mesh.data = 1
  config.mesh.fsdp = 256
  return config
