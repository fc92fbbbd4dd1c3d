"""GPT-3 small (Brown et al. 2020, table 2.1): 125M parameters, for one GPU.

  python -m flaxlm.train --config=configs/gpt3_125m.py --workdir=runs/gpt3_125m

Not trained here: no result is claimed. GPT-2's architecture with rows of 2048 tokens;
every second layer has local attention, as in the Sparse Transformer (Child et al.
2019). The window was not published; 256 tokens is GPT-Neo's choice, and ours. The batch
size is constant, while theirs grew at the start. 300B tokens. On n devices, divide
accumulation_steps by n.
"""

from . import gpt2_124m


def get_config():
  config = gpt2_124m.get_config()
  config.hardware = "v5e:2x2"
  config.num_steps = 572_000
  config.data.seq_len = 2048
  config.data.batch_size = 256  # 0.5M tokens
  config.model.sliding_window = 256
  config.model.layer_pattern = ("global", "local")
  config.optim.warmup_steps = 715  # 375M tokens
  return config
