"""The card that a run prints before training: what is trained, on what, from what."""

import math
import pathlib
import socket
import sys

import jax

from flaxlm.console import print_card, short_number
from flaxlm.data.feed import Feed
from flaxlm.models.cost import flops_per_token
from flaxlm.parallel.pipeline import bubble
from flaxlm.parallel.sharding import bytes_per_device
from flaxlm.runs import weights
from flaxlm.training.state import TrainState


def print_run_card(
  config,
  workdir: pathlib.Path,
  target: TrainState,
  feed: Feed,
  mesh: jax.sharding.Mesh,
  first_step: int,
  allocator: str,
) -> None:
  """Prints the card of a run; process 0 only.

  Args:
    target: the abstract state, with shardings.
    allocator: what `machine.keep_freed_memory` returned.
  """
  if jax.process_index():
    return
  model, data = config.model, config.data
  text, epochs = feed.describe(config.num_steps)
  whole = weights.abstract_model(config)
  tables = (whole.embed, whole.positions, whole.segment_types, whole.unembed)
  total, embedded = _count_parameters(whole), _count_parameters(tables)
  trained = ""
  if config.lora.rank:
    trained = f"; trained: {_count_parameters(target.model):,} weights"
  print_summary(
    model=f"{model.num_layers} layers, {model.embed_dim} wide, "
    f"{model.num_heads} heads, context {data.seq_len}, {model.positions} positions, "
    f"{model.norm}, {model.activation}, {model.dtype}, attention {model.attention}"
    f"{trained}",
    parameters={"layers": total - embedded, "embeddings": embedded},
    tokens_per_step=data.batch_size * data.seq_len,
    num_steps=config.num_steps,
    flops_per_token=flops_per_token(model, data.seq_len),
    mesh={axis: n for axis, n in mesh.shape.items() if n > 1} or {"data": 1},
    pipeline=_describe_pipeline(config.mesh, mesh.shape["stage"]),
    device_kind=jax.devices()[0].device_kind,
    bytes_per_device={
      "parameters": bytes_per_device(target.model),
      "optimizer": bytes_per_device(target.opt_state),
    },
    data=text,
    epochs=epochs,
    tokenizer=f"{feed.tokenizer_sha256[:12] or 'none'}, vocabulary {model.vocab_size}",
    workdir=workdir,
    resume=f"from step {first_step}" if first_step else "new run",
    xla=allocator if jax.default_backend() == "cpu" else "",
  )


def _describe_pipeline(knobs, stages: int) -> str:
  """Returns the pipeline of config.mesh in words; "" if there is none."""
  if stages == 1:
    return ""
  micro, rounds = knobs.microbatches or stages, knobs.stage_repeats
  idle = bubble(stages, micro, rounds)
  return f"{micro} microbatches, {rounds} rounds of {stages} stages: {idle:.1%} bubble"


def _count_parameters(tree) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def print_summary(
  *,
  model: str,
  parameters: dict[str, int],
  tokens_per_step: int,
  num_steps: int,
  flops_per_token: float,
  mesh: dict[str, int],
  device_kind: str,
  bytes_per_device: dict[str, int],
  data: str,
  epochs: float | None,
  tokenizer: str,
  workdir,
  resume: str,
  pipeline: str = "",
  xla: str = "",
  stream=None,
) -> None:
  """Prints the card from plain values.

  Args:
    model: layers and dimensions in words.
    parameters: counts by group; the total is their sum.
    mesh: sizes by axis.
    bytes_per_device: by what they hold, such as parameters and optimizer state.
    data: sources and tokens in words.
    epochs: passes over the data in this run; None if unknown.
    resume: "from step 500" or "new run".
    pipeline, xla: in words; "" if there is none. XLA's settings are for CPUs.
  """
  stream = stream or sys.stdout
  groups = ", ".join(f"{name} {short_number(n)}" for name, n in parameters.items())
  total_tokens = tokens_per_step * num_steps
  tokens = f"{tokens_per_step:,} per step x {num_steps:,} steps"
  axes = " x ".join(f"{name} {size}" for name, size in mesh.items())
  devices = f"{math.prod(mesh.values())} x {device_kind} ({socket.gethostname()})"
  held = ", ".join(
    f"{name} {size / 2**20:,.1f} MiB" for name, size in bytes_per_device.items()
  )
  rows = [
    ("model", model),
    ("parameters", f"{sum(parameters.values()):,} ({groups})"),
    ("tokens", f"{tokens} = {short_number(total_tokens)}"),
    (
      "compute",
      f"{flops_per_token / 1e9:.4g} GFLOP per token (attention: visible pairs), "
      f"{flops_per_token * total_tokens:.3g} FLOP in all",
    ),
    ("mesh", f"{axes} on {devices}"),
    ("pipeline", pipeline),
    ("each device", held),
    ("data", data + (f"; {epochs:.3g} epochs" if epochs is not None else "")),
    ("tokenizer", tokenizer),
    ("workdir", f"{workdir} ({resume})"),
    ("XLA:CPU", xla),
  ]
  print_card([(label, text) for label, text in rows if text], stream)
