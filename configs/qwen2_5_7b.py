"""Qwen 2.5 7B (Qwen Team 2024): biases in query, key and value, for 64 devices.

  python -m flaxlm.train --config=configs/qwen2_5_7b.py --workdir=runs/qwen2_5_7b

Not trained here: no result is claimed. Its optimizer settings were not published; these
are Llama 2's. Rows have 4096 tokens, as in most of its training. The embedding table
has more rows than the vocabulary. --config.tokenizer.path takes its tokenizer;
otherwise one of its size is trained.
"""

from flaxlm.config import base


def get_config():
  config = base.get_config()
  config.hardware = "v5p:4x4x4"
  config.num_steps = 500_000
  config.tokenizer.vocab_size = 151_665
  config.tokenizer.train_bytes = 1_000_000_000
  config.data.store = "data/c4_qwen2_5"
  config.data.sources = base.sources(
    main=base.source("tfds", "c4/en", validation_split="validation")
  )
  config.data.seq_len = 4096
  config.data.batch_size = 1024

  model = config.model
  model.vocab_size = 152_064
  model.max_len = 131_072
  model.num_layers = 28
  model.embed_dim = 3584
  model.num_heads = 28
  model.num_kv_heads = 4
  model.head_dim = 128
  model.mlp_dim = 18_944
  model.norm_epsilon = 1e-6
  model.qkv_bias = True
  model.rope.theta = 1_000_000.0
  model.tie_embeddings = False
  model.dtype = "bfloat16"
  model.remat = "full"

  config.optim.peak_learning_rate = 3e-4
  config.optim.warmup_steps = 2000
  config.mesh.fsdp = 64
  config.step.accumulation_steps = 8
  return config
