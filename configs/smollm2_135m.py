"""SmolLM2 135M (Ben Allal et al. 2025), for one GPU.

  python -m flaxlm.train --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m

Not trained here: no result is claimed. The published settings: 2T tokens in rows of
2048. The original used a rotary base of 10,000 and was extended to 8192 tokens at the
end; the base here is the final one. On n devices, divide accumulation_steps by n.
"""

from flaxlm.config import base


def get_config():
  config = base.get_config()
  config.hardware = "v5e:2x2"
  config.num_steps = 2_000_000
  config.tokenizer.vocab_size = 49_152
  config.tokenizer.train_bytes = 1_000_000_000
  config.data.store = "data/c4_smollm2"
  config.data.sources = base.sources(
    main=base.source("tfds", "c4/en", validation_split="validation")
  )
  config.data.seq_len = 2048
  config.data.batch_size = 512

  model = config.model
  model.max_len = 8192
  model.num_layers = 30
  model.embed_dim = 576
  model.num_heads = 9
  model.num_kv_heads = 3
  model.mlp_dim = 1536
  model.rope.theta = 100_000.0
  model.dtype = "bfloat16"
  model.remat = "dots"

  config.optim.peak_learning_rate = 3e-3
  config.optim.schedule = "wsd"
  config.optim.warmup_steps = 2000
  config.optim.decay_fraction = 0.2
  config.optim.end_factor = 0.0
  config.optim.weight_decay = 0.01
  config.step.accumulation_steps = 64
  return config
