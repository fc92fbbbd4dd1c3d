"""OLMo 2 7B (OLMo Team 2025), first stage, for 64 devices.

  python -m flaxlm.train --config=configs/olmo2_7b.py --workdir=runs/olmo2_7b

Not trained here: no result is claimed. The published settings: a cosine over 5T tokens,
stopped at 3.9T. Their embeddings have no weight decay, ours do. Norms come after
attention and MLP; QK-norm is over all heads of a token together. On 64n devices, divide
accumulation_steps by n.
"""

from flaxlm.config import base


def get_config():
  config = base.get_config()
  config.hardware = "v5p:4x4x4"
  config.num_steps = 1_192_000
  config.tokenizer.vocab_size = 100_278
  config.tokenizer.train_bytes = 1_000_000_000
  config.data.store = "data/c4_olmo2"
  config.data.sources = base.sources(
    main=base.source("tfds", "c4/en", validation_split="validation")
  )
  config.data.seq_len = 4096
  config.data.batch_size = 1024

  model = config.model
  model.vocab_size = 100_352
  model.num_layers = 32
  model.embed_dim = 4096
  model.num_heads = 32
  model.num_kv_heads = 32
  model.head_dim = 128
  model.mlp_dim = 11_008
  model.norm_epsilon = 1e-6
  model.norm_placement = "post"
  model.qk_norm = "full"
  model.rope.theta = 500_000.0
  model.tie_embeddings = False
  model.dtype = "bfloat16"
  model.remat = "full"

  config.optim.peak_learning_rate = 3e-4
  config.optim.warmup_steps = 2000
  config.mesh.fsdp = 64
  config.step.z_loss = 1e-5
  config.step.accumulation_steps = 8
  return config
