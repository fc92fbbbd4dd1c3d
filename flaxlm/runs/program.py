"""What a run computes, from shapes alone: its state, its step, its batch.

The loop runs this; `flaxlm plan` compiles the same for machines that are not here.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxlm.config.rules import attention_case
from flaxlm.data.batches import masking
from flaxlm.data.batches.synthetic import SyntheticBatches
from flaxlm.data.feed import Feed
from flaxlm.data.tasks.labels import Labels
from flaxlm.errors import ConfigError
from flaxlm.kernels.attention.choice import why_not
from flaxlm.models.config import TransformerConfig
from flaxlm.models.trees import named_leaves
from flaxlm.parallel.placement import batch_sharding
from flaxlm.parallel.sharding import check_split, use_mesh
from flaxlm.runs import weights
from flaxlm.training import lora
from flaxlm.training.optim import make_optimizer
from flaxlm.training.state import (
  TrainState,
  init_state,
  make_train_step,
  shardings_of,
  with_shardings,
)

# XLA:CPU has two libraries for matrix products. With its default, YNN, steps of narrow
# models are 2 to 9% slower than with Eigen; those of GPT-2 124M are a tenth faster
# (tests/benchmarks/RESULTS.md).
EIGEN = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
WIDE = 768  # model.embed_dim from which on YNN is faster


class Program(NamedTuple):
  """What `build_program` returns."""

  tx: optax.GradientTransformation
  learning_rate: Callable
  init: Callable  # jitted: key -> TrainState
  target: TrainState  # abstract, with shardings
  assemble: Callable  # (what is trained, frozen weights or None) -> model
  # Jitted: (state, batch, frozen weights or None) -> (state, metrics).
  train_step: Callable


def use_config_mesh(
  config, mesh: jax.sharding.Mesh
) -> contextlib.AbstractContextManager:
  """Returns `use_mesh` with the knobs of config.mesh; programs are traced inside."""
  knobs = config.mesh
  return use_mesh(mesh, knobs.rules.to_dict(), knobs.microbatches, knobs.stage_repeats)


def open_feed(
  config,
  mesh: jax.sharding.Mesh,
  tokenizer_path: str | os.PathLike = "",
  template_path: str = "",
  training: bool = True,
  labels: Labels | None = None,
) -> Feed:
  """Opens the data of a config, resolved or not; see `Feed` for the arguments."""
  return Feed(
    config.data,
    config.objective,
    config.task,
    config.model,
    config.mesh,
    mesh,
    seed=config.seed,
    accumulation_steps=config.step.accumulation_steps,
    eval_batches=config.eval.batches,
    tokenizer_path=tokenizer_path,
    template_path=template_path,
    training=training,
    labels=labels,
  )


def build_program(config, mesh: jax.sharding.Mesh) -> Program:
  """Returns what `config` computes on `mesh`; no weight is allocated.

  Raises:
    ConfigError: the mesh, its rules, the kernel or the unrolled layers do not suit the
      model or the devices.
  """
  backend, platform = config.model.attention, mesh.devices.flat[0].platform
  if why := why_not(backend, attention_case(config, platform)):
    raise ConfigError("config.model.attention", backend, why, "auto")
  check_unrolled(config.model, platform)
  tx, learning_rate = make_optimizer(config.num_steps, **config.optim)
  initial = make_init(config, tx)
  with use_config_mesh(config, mesh):
    rules = config.mesh.rules.to_dict()
    state = jax.eval_shape(lambda: initial(jax.random.key(0)))
    target = with_shardings(state, mesh, rules, config.step.offload_optimizer)
    whole = target.model
    if config.lora.rank:  # what is trained are small additions
      whole = with_shardings(weights.abstract_model(config), mesh, rules)
    check_split(named_leaves(whole), mesh)
  # It runs once: full optimisation would take longer than it saves (RESULTS.md).
  options = {"xla_backend_optimization_level": 1} if platform == "cpu" else None
  init = jax.jit(initial, out_shardings=shardings_of(target), compiler_options=options)
  assemble = weights.assembler(config)
  train_step = jax.jit(
    make_train_step(
      tx, learning_rate, **config.step, seed=config.seed,
      bias_rate=_balancing_rate(config.model.moe), assemble=assemble,
    ),
    donate_argnums=0,
    out_shardings=(shardings_of(target), NamedSharding(mesh, P())),
    compiler_options=step_options(config.model, platform),
  )  # fmt: skip
  return Program(tx, learning_rate, init, target, assemble, train_step)


def check_unrolled(model, platform: str) -> None:
  """Raises ConfigError if XLA would undo the rematerialisation of config.model."""
  unrolled = 1 < model.num_layers <= model.unroll
  if platform == "cpu" and unrolled and model.remat != "none":
    needed = (
      f"fewer than the {model.num_layers} layers for config.model.remat={model.remat}: "
      "on a CPU XLA merges what is computed again with what is there"
    )
    raise ConfigError("config.model.unroll", model.unroll, needed, "1")


def step_options(model, platform: str) -> dict | None:
  """Returns XLA's options for the training step; None if it needs or knows none."""
  if platform != "cpu" or model.embed_dim >= WIDE:
    return None
  try:
    jax.jit(lambda: 0, compiler_options=EIGEN).lower().compile()
  except jax.errors.JaxRuntimeError:  # the option is experimental: XLA may drop it
    return None
  return EIGEN


def make_init(config, tx: optax.GradientTransformation) -> Callable:
  """Returns key -> state of a new run."""
  adapt = {}
  if config.lora.rank:
    adapt["adapt"] = functools.partial(lora.init, **config.lora, seed=config.seed)
  return functools.partial(
    init_state,
    model_config=TransformerConfig(**config.model),
    tx=tx,
    ema_decay=config.step.ema_decay,
    **adapt,
  )


def _balancing_rate(moe) -> float:
  return moe.bias_rate if moe.num_experts and moe.balance == "bias" else 0.0


def abstract_batch(config, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes, types and shardings of a batch of config.objective."""
  objective = masking.Objective(**config.objective)
  data, vocab_size = config.data, config.model.vocab_size
  vocabulary = None
  if objective != masking.CAUSAL:
    vocabulary = masking.synthetic_vocabulary(objective, vocab_size)
  rows = SyntheticBatches(
    data.seq_len, 1, config.seed, vocab_size, objective=objective, vocabulary=vocabulary
  )[0]
  sharding = batch_sharding(config.mesh.rules.to_dict(), mesh)
  return {
    name: jax.ShapeDtypeStruct(
      (data.batch_size, *row.shape[1:]),
      row.dtype,
      sharding=sharding,
    )
    for name, row in rows.items()
  }
