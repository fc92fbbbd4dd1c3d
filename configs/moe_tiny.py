"""A small mixture of experts: the quickstart's model with 2 of 8 experts a token.

  python -m flaxlm.train --config=configs/moe_tiny.py --workdir=runs/moe_tiny

TODO
"""

from configs import quickstart


def get_config():
  config = quickstart.get_config()
  model = config.model
  model.moe.num_experts = 8
  model.moe.experts_per_token = 2
  model.moe.expert_dim = 176  # two of them are as wide as the quickstart's MLP
  return config
