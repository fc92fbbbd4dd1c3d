"""A small mixture of experts: the quickstart's model with 2 of 8 experts a token.

  python -m flaxlm.prepare --config=configs/moe_tiny.py
  python -m flaxlm.train --config=configs/moe_tiny.py --workdir=runs/moe_tiny

It takes some minutes on 2 CPU cores, and the quickstart's store of tokens. Experts
have room for twice their fair share: on CPU that costs half as much as dropping no
token, and once the loads are even nothing is dropped.
"""

from . import quickstart


def get_config():
  config = quickstart.get_config()
  config.hardware = "cpu"
  moe = config.model.moe
  moe.num_experts = 8
  moe.experts_per_token = 2
  moe.expert_dim = 176  # two of them are as wide as the quickstart's MLP
  moe.capacity_factor = 2.0
  return config
