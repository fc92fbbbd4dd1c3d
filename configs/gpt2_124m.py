"""GPT-2 small (Radford et al. 2019): 124M parameters, for one GPU.

  python -m flaxlm.train --config=configs/gpt2_124m.py --workdir=runs/gpt2_124m

Not trained here: no result is claimed. 0.5M tokens per step, as in GPT-3 small. A
micro-batch of 16 rows needs 13 GiB by the compiler's count (XLA:CPU; 46 without remat).
On n devices, divide accumulation_steps by n.
"""

from flaxlm.config import base


def get_config():
  config = base.get_config()
  config.hardware = "v5e:2x2"
  config.num_steps = 20_000
  config.tokenizer.vocab_size = 50_257
  config.tokenizer.train_bytes = 1_000_000_000
  config.data.store = "data/c4"
  config.data.sources = base.sources(
    main=base.source("tfds", "c4/en", validation_split="validation")
  )
  config.data.seq_len = 1024
  config.data.batch_size = 512

  model = config.model
  model.num_layers = 12
  model.embed_dim = 768
  model.num_heads = 12
  model.num_kv_heads = 12
  model.mlp_dim = 3072
  model.positions = "learned"
  model.norm = "layernorm"
  model.gated_mlp = False
  model.activation = "gelu_tanh"
  model.use_bias = True
  model.dtype = "bfloat16"

  config.optim.peak_learning_rate = 6e-4
  config.optim.warmup_steps = 700
  model.remat = "dots"
  config.step.accumulation_steps = 32
  return config
