"""The optimizer and its learning rate, from optax.

Which weights decay, and which ones Muon takes, is decided by their names.
"""

from collections.abc import Callable

import jax
import optax
from optax.contrib import MuonDimensionNumbers

# Dimension 0 of a stacked weight is the layer, and dimension 1 of an expert's is the
# expert: Muon treats each matrix separately.
_INTO_HEADS = MuonDimensionNumbers(reduction_axis=1, output_axis=(2, 3))
_MATRIX = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
_EXPERT = MuonDimensionNumbers(reduction_axis=2, output_axis=3)
MUON_DIMENSIONS = {
  "query": _INTO_HEADS,
  "key": _INTO_HEADS,
  "value": _INTO_HEADS,
  "out": MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=3),
  "up": _MATRIX,
  "gate": _MATRIX,
  "down": _MATRIX,
  "expert_up": _EXPERT,
  "expert_gate": _EXPERT,
  "expert_down": _EXPERT,
}


def make_schedule(
  peak_learning_rate: float,
  schedule: str,
  num_steps: int,
  warmup_steps: int,
  decay_fraction: float,
  end_factor: float,
) -> Callable:
  """Returns update number -> learning rate: a linear warm-up from 0, then `schedule`.

  cosine and linear fall to end_factor * peak at num_steps. wsd (warm-up, stable, decay;
  arXiv 2404.06395) stays at the peak and falls linearly over the last decay_fraction of
  the steps.
  """
  rest = max(num_steps - warmup_steps, 1)
  end = peak_learning_rate * end_factor
  if schedule == "cosine":
    after = optax.cosine_decay_schedule(peak_learning_rate, rest, end_factor)
  elif schedule == "linear":
    after = optax.linear_schedule(peak_learning_rate, end, rest)
  elif schedule == "wsd":
    decay = max(int(decay_fraction * num_steps), 1)
    start = max(rest - decay, 0)
    after = optax.linear_schedule(peak_learning_rate, end, decay, start)
  elif schedule == "constant":
    after = optax.constant_schedule(peak_learning_rate)
  else:
    raise ValueError(f"there is no schedule {schedule!r}")
  if not warmup_steps:
    return after
  warmup = optax.linear_schedule(0.0, peak_learning_rate, warmup_steps)
  # Updates count from 0: without the shift, the first one would have a rate of zero.
  return lambda i: optax.join_schedules([warmup, after], [warmup_steps])(i + 1)


def make_optimizer(
  num_steps: int,
  *,
  name: str,
  peak_learning_rate: float,
  schedule: str,
  warmup_steps: int,
  decay_fraction: float,
  end_factor: float,
  weight_decay: float,
  b1: float,
  b2: float,
  epsilon: float,
  max_grad_norm: float,
) -> tuple[optax.GradientTransformation, Callable]:
  """Returns (optimizer with gradient clipping, update number -> learning rate)."""
  rate = make_schedule(
    peak_learning_rate, schedule, num_steps, warmup_steps, decay_fraction, end_factor
  )
  if name == "adamw":
    tx = optax.adamw(rate, b1, b2, epsilon, weight_decay=weight_decay, mask=decays)
  elif name == "lion":
    tx = optax.lion(rate, b1, b2, weight_decay=weight_decay, mask=decays)
  elif name == "adafactor":
    tx = _adafactor(rate, peak_learning_rate, weight_decay)
  elif name == "muon":
    tx = _muon(rate, b1, b2, weight_decay)
  else:
    raise ValueError(f"there is no optimizer {name!r}")
  if max_grad_norm:
    tx = optax.chain(optax.clip_by_global_norm(max_grad_norm), tx)
  return tx, rate


def _adafactor(
  rate: Callable, peak_learning_rate: float, weight_decay: float
) -> optax.GradientTransformation:
  # Adafactor does not multiply its decay by the rate: it is scaled here, so that one
  # value means the same for all optimizers.
  return optax.adafactor(
    rate,
    multiply_by_parameter_scale=False,
    weight_decay_rate=weight_decay * peak_learning_rate,
    weight_decay_mask=decays,
  )


def _muon(
  rate: Callable, b1: float, b2: float, weight_decay: float
) -> optax.GradientTransformation:
  return optax.contrib.muon(
    rate,
    beta=b1,
    weight_decay=weight_decay,
    weight_decay_mask=decays,
    adam_b1=b1,
    adam_b2=b2,
    adam_weight_decay=weight_decay,
    muon_weight_dimension_numbers=_muon_dimensions,
    consistent_rms=0.2,  # updates as large as Adam's at one rate: arXiv 2502.16982
  )


def leaf_name(path: tuple) -> str:
  """Returns the last name of a weight: "query_bias" of blocks/attention/query_bias."""
  names = [jax.tree_util.keystr((key,), simple=True) for key in path]
  return names[-2] if names[-1] == "value" else names[-1]  # nnx.Param adds a "value"


def decays(params):
  """Returns a tree of bools: whether each weight decays.

  By name, not by rank: a stack of norm scales has two dimensions.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not leaf_name(path).endswith(("scale", "bias", "sinks")), params
  )


def _muon_dimensions(params):
  """Returns the dimensions of each matrix for Muon; None gives a weight to Adam."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: MUON_DIMENSIONS.get(leaf_name(path)), params
  )
