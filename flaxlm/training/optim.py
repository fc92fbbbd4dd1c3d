"""The optimizer and its learning rate, from optax; what each weight gets, by name."""

from collections.abc import Callable

import jax
import optax
from optax.contrib import MuonDimensionNumbers

# Stacked weights have the layer in dimension 0, and the expert in dimension 1: Muon
# treats each matrix alone.
INTO_HEADS = MuonDimensionNumbers(reduction_axis=1, output_axis=(2, 3))
MATRIX = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
EXPERT = MuonDimensionNumbers(reduction_axis=2, output_axis=3)
MUON_DIMENSIONS = {
  "query": INTO_HEADS,
  "key": INTO_HEADS,
  "value": INTO_HEADS,
  "out": MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=3),
  "up": MATRIX,
  "gate": MATRIX,
  "down": MATRIX,
  "expert_up": EXPERT,
  "expert_gate": EXPERT,
  "expert_down": EXPERT,
}


def make_schedule(
  peak_learning_rate: float,
  schedule: str,
  num_steps: int,
  warmup_steps: int,
  decay_fraction: float,
  end_factor: float,
) -> Callable:
  """Learning rate of update i: linear from 0 over the warm-up, then `schedule`.

  cosine and linear fall to end_factor * peak at num_steps; wsd (warm-up, stable, decay;
  arXiv 2404.06395) stays at the peak and falls linearly in the last decay_fraction.
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
  # Updates count from 0: shifted by one, so that none is spent on a rate of zero.
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
  """Returns (optimizer with clipping, learning rate as a function of the update)."""
  rate = make_schedule(
    peak_learning_rate, schedule, num_steps, warmup_steps, decay_fraction, end_factor
  )
  if name == "adamw":
    tx = optax.adamw(rate, b1, b2, epsilon, weight_decay=weight_decay, mask=decays)
  elif name == "lion":
    tx = optax.lion(rate, b1, b2, weight_decay=weight_decay, mask=decays)
  elif name == "adafactor":
    # Adafactor applies its decay after the rate: scaled here, so that one value means
    # the same for all of these optimizers.
    tx = optax.adafactor(
      rate,
      multiply_by_parameter_scale=False,
      weight_decay_rate=weight_decay * peak_learning_rate,
      weight_decay_mask=decays,
    )
  elif name == "muon":
    tx = optax.contrib.muon(
      rate,
      beta=b1,
      weight_decay=weight_decay,
      weight_decay_mask=decays,
      adam_b1=b1,
      adam_b2=b2,
      adam_weight_decay=weight_decay,
      muon_weight_dimension_numbers=muon_dimensions,
      consistent_rms=0.2,  # updates as large as Adam's, for one rate: arXiv 2502.16982
    )
  else:
    raise ValueError(f"there is no optimizer {name!r}")
  if max_grad_norm:
    tx = optax.chain(optax.clip_by_global_norm(max_grad_norm), tx)
  return tx, rate


def leaf_name(path: tuple) -> str:
  """The attribute name of a weight: "query_bias" of blocks/attention/query_bias."""
  names = [jax.tree_util.keystr((key,), simple=True) for key in path]
  return names[-2] if names[-1] == "value" else names[-1]  # nnx.Param adds a "value"


def decays(params):
  """True for weights that decay. By name: stacked norm scales have two dimensions."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not leaf_name(path).endswith(("scale", "bias", "sinks")), params
  )


def muon_dimensions(params):
  """Which weights Muon orthogonalises, and along what; Adam takes the others."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: MUON_DIMENSIONS.get(leaf_name(path)), params
  )
