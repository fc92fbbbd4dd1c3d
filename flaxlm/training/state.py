"""The training state and the step that advances it.

The state is one pytree. Weights and optimizer moments share their structure, so one
walk shards, saves or compares them. Batches are a pure function of (seed, rows before),
and a checkpoint counts these rows beside the state (runs/begin.py).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flaxlm.models.moe import rebalance
from flaxlm.models.transformer import Transformer, TransformerConfig
from flaxlm.parallel.sharding import constrain, current_layout, sharding_of
from flaxlm.training.losses import count_predicted, summed_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  step: jax.Array  # batches consumed
  skipped: jax.Array  # those of them whose update was not finite
  model: Transformer  # or its adapters, if only these are trained
  opt_state: optax.OptState
  ema: Transformer | None  # moving average of the weights since step 1, debiased

  @property
  def eval_model(self) -> Transformer:
    """The weights to evaluate: the average where there is one."""
    return self.model if self.ema is None else self.ema


def init_state(
  key: jax.Array,
  model_config: TransformerConfig,
  tx: optax.GradientTransformation,
  ema_decay: float,
  adapt: Callable = lambda model: model,
) -> TrainState:
  """Returns a state at step 0. `adapt` maps the model to what is trained (LoRA)."""
  model = adapt(Transformer(model_config, nnx.Rngs(key)))
  ema = jax.tree.map(jnp.copy, model) if ema_decay else None
  return TrainState(
    jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), model, tx.init(model), ema
  )


def with_shardings(state, mesh: jax.sharding.Mesh, rules: dict, offload: bool = False):
  """Returns an abstract state with a sharding for each `ShapeDtypeStruct`.

  Weights are placed by their `axes`, and optimizer moments like their weights. Arrays
  of another rank (counters, factored moments) are small: every device has a copy. With
  `offload` the optimizer's arrays are placed in the host's memory.
  """

  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = getattr(leaf, "axes", None)
    array = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    if isinstance(array, optax.MaskedNode):  # a weight of the other optimizer (Muon)
      return leaf
    # A stack of layers has one leading dimension that its axes do not name.
    parts = name.split("/")
    stack = ("layer",) * ("blocks" in parts) + (None,) * ("first_blocks" in parts)
    if axes is None or len(array.shape) != len(axes) + len(stack):
      axes, stack = (None,) * len(array.shape), ()
    axes = (*stack, *axes)
    sharding = sharding_of(name, array.shape, axes, mesh, rules)
    if offload and parts[0] == "opt_state" and array.ndim:
      sharding = sharding.with_memory_kind("pinned_host")
    array = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    return leaf.replace(array) if isinstance(leaf, nnx.Variable) else array

  return jax.tree_util.tree_map_with_path(
    place, state, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )


def shardings_of(abstract_state):
  """Returns the tree of shardings that `with_shardings` added."""
  return jax.tree.map(lambda array: array.sharding, abstract_state)


def make_train_step(
  tx: optax.GradientTransformation,
  learning_rate: Callable,
  *,
  z_loss: float,
  accumulation_steps: int,
  ema_decay: float,
  offload_optimizer: bool,
  seed: int = 0,
  bias_rate: float = 0.0,
  assemble: Callable = lambda trained, base: trained,
) -> Callable:
  """Returns `step(state, batch, base=None) -> (state, metrics)`; donate the state.

  Args:
    seed: of dropout; its masks are a function of (seed, step).
    bias_rate: step size of the experts' balancing bias; 0 = no bias.
    assemble: returns the model, from what is trained and frozen weights, `base`.
  """

  def step(state: TrainState, batch, base=None):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    counts = count_predicted(batch)

    def loss(trained, part, earlier_load, key):
      model = assemble(trained, base)
      return summed_loss(model, part, counts, z_loss, earlier_load, key)

    metrics, grads = _gradients(loss, state.model, batch, key, accumulation_steps)
    grad_norm = optax.tree.norm(grads)
    old_opt_state = state.opt_state
    if offload_optimizer:  # the shardings of the outputs send it back
      old_opt_state = jax.device_put(old_opt_state, jax.memory.Space.Device)
    updates, opt_state = tx.update(grads, old_opt_state, state.model)
    model = optax.apply_updates(state.model, updates)
    if bias_rate:
      model = rebalance(model, metrics["expert_load"], bias_rate)
    # A bad gradient would stay in Adam's moments for ever: keep the old state instead.
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    model = _select(finite, model, state.model)
    opt_state = _select(_known_after(model, finite), opt_state, old_opt_state)
    ema = state.ema
    if ema is not None:
      number = state.step - state.skipped + 1
      ema = _select(finite, _move_average(ema, model, ema_decay, number), ema)
    skipped = state.skipped + (~finite).astype(jnp.int32)
    metrics = _summarize_load(metrics) | {
      "grad_norm": grad_norm,
      "learning_rate": learning_rate(state.step - state.skipped),
      "bad": ~finite,
      "skipped": skipped,
    }
    return TrainState(state.step + 1, skipped, model, opt_state, ema), metrics

  return step


def _move_average(average, model, decay: float, number: jax.Array):
  """Returns the average of the weights after all updates; this is update `number`.

  The weights of i updates ago count decay^i, and all counts sum to 1, from the first
  update on. So what is stored is debiased (as Adam's moments are when they are used:
  Kingma and Ba 2015, section 3), and its readers need not know the step.
  """
  log_decay = jnp.float32(math.log(decay))
  newest = (1 - decay) / -jnp.expm1(number * log_decay)

  def move(a, m):
    return jnp.where(number == 1, m, a + (newest * (m - a)).astype(a.dtype))

  return jax.tree.map(move, average, model)


def _gradients(loss: Callable, trained, batch, key, accumulation_steps: int):
  """Returns (metrics, gradient) of a batch, summed over its micro-batches.

  Args:
    loss: (trained, micro-batch, expert_load of the earlier ones, key) -> (its part of
      the batch's loss, metrics that add up).
  """
  compute = jax.value_and_grad(loss, has_aux=True)
  if accumulation_steps == 1:
    (_, metrics), grads = compute(trained, batch, 0.0, key)
    return metrics, grads

  def split(x):
    # Micro-batch a has the rows a, a+A, a+2A, ...: no row moves to another device.
    x = jnp.swapaxes(x.reshape(-1, accumulation_steps, *x.shape[1:]), 0, 1)
    return constrain(x, None, "batch", "length")

  def of_part(part, number, earlier_load):
    part_key = jax.random.fold_in(key, number)
    (_, metrics), grads = compute(trained, part, earlier_load, part_key)
    return metrics, grads

  def add(total, part_and_number):
    earlier_load = total[0].get("expert_load", 0.0)
    new = of_part(*part_and_number, earlier_load)
    return jax.tree.map(jnp.add, total, new), None

  parts = jax.tree.map(split, batch)
  one = jax.tree.map(lambda x: x[0], parts)
  zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, one, 0, 0.0))
  total, _ = jax.lax.scan(add, zero, (parts, jnp.arange(accumulation_steps)))
  return total


def _summarize_load(metrics: dict) -> dict:
  """Returns the metrics with the load of each expert as a share of all assignments."""
  if "expert_load" not in metrics:
    return metrics
  load_SE = metrics["expert_load"]
  share_SE = load_SE / jnp.maximum(jnp.sum(load_SE, axis=1, keepdims=True), 1.0)
  fair = 1 / load_SE.shape[1]
  pairs = jnp.sum(load_SE)
  return metrics | {
    "expert_load": jnp.mean(share_SE, axis=0),
    "load_max": jnp.max(share_SE) / fair,  # of the fullest expert of any layer
    "load_min": jnp.min(share_SE) / fair,
    "dropped": metrics["dropped"] / jnp.maximum(pairs, 1.0),
  }


def _known_after(tree, condition: jax.Array) -> jax.Array:
  """Returns `condition`; on one CPU it depends on all arrays of `tree`.

  So the moments change after the weights, which are computed from their old values, and
  they can change in place. Otherwise XLA:CPU copies all of them in every step.
  """
  now = current_layout()
  devices = jax.devices()[:1] if now is None else [*now.mesh.devices.flat]
  if len(devices) > 1 or devices[0].platform != "cpu":
    return condition
  ends = [x.ravel()[0] for x in jax.tree.leaves(jax.lax.optimization_barrier(tree))]
  return condition & jnp.all(jnp.stack([x == x for x in ends]))


def _select(condition: jax.Array, one, other):
  """Returns the tree `one` if `condition` holds, else `other`, on the device."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)
