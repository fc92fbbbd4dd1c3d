"""A training step as a list of operations: what one chip computes and moves.

The list follows models/transformer.py: each matrix product with its two gradients, each
attention, and the passes over memory between them. roofline.py turns it into seconds.
"""

import math
from typing import NamedTuple

from flaxlm.kernels.cross_entropy import chunk_tokens
from flaxlm.models.config import window_of
from flaxlm.models.cost import mean_keys


class Op(NamedTuple):
  """One operation, forward and backward together."""

  kind: str  # one that planning/microbenchmarks.py can measure
  dims: tuple[int, ...]  # the sizes that it needs for that
  count: float  # per step and chip
  flops: float  # of one
  bytes: float  # to and from memory, of one
  again: float = 0.0  # share of one that the backward pass computes again (remat)


class Share(NamedTuple):
  """The share of a step that one chip has."""

  rows: float  # per pass
  tokens: float  # per pass: rows x its piece of the length
  passes: int  # accumulation steps x microbatches of the pipeline
  layers: float
  ticks: int  # of the pipeline, per accumulation step


def share(config, sizes: dict[str, int]) -> Share:
  """Returns the share of each chip; `sizes` are of the mesh axes, without -1."""
  replicas = math.prod(sizes[axis] for axis in ("slice", "data", "fsdp", "expert"))
  accumulation, stages = config.step.accumulation_steps, sizes["stage"]
  waves = (config.mesh.microbatches or stages) if stages > 1 else 1
  passes = accumulation * waves
  rows = config.data.batch_size / replicas / passes
  tokens = rows * config.data.seq_len / sizes["context"]
  ticks = waves * config.mesh.stage_repeats + stages - 1 if stages > 1 else 1
  return Share(rows, tokens, passes, config.model.num_layers / stages, ticks)


def itemsize(config) -> int:
  """Returns the bytes of one activation."""
  return 2 if config.model.dtype == "bfloat16" else 4


def _matmul(config, tokens, k, n, count, again, batch=1) -> Op:
  """Returns `batch` products of (tokens, k) with (k, n), and both gradients."""
  m, k, n = (max(round(x), 1) for x in (tokens, k, n))
  moved = 3 * batch * (m * k + k * n + m * n) * itemsize(config)
  return Op("matmul", (batch, m, k, n), count, 6 * batch * m * k * n, moved, again / 3)


def operations(config, sizes: dict[str, int], flash: bool) -> list[Op]:
  """Returns all operations of a step on one chip.

  Args:
    sizes: of the mesh axes, without -1.
    flash: attention computes only visible blocks, and keeps no scores in memory.
  """
  model, part = config.model, share(config, sizes)
  full = model.remat == "full"
  ops = _attention_ops(config, sizes, part, flash)
  ops += _mlp_ops(config, sizes, part, full)
  ops += _head_ops(config, sizes, part)
  width = itemsize(config)
  T, D = max(round(part.tokens), 1), model.embed_dim
  calls = part.passes * part.layers
  # Forward reads the stream and what is added, and writes both; backward about twice.
  norm = 10 * T * D * width
  ops.append(Op("norm", (T, D), 2 * calls + part.passes, 0, norm, 0.3 * full))
  count = _parameters(config, sizes)
  # AdamW reads a weight, its gradient and two moments, and writes three: 28 bytes. The
  # gradient norm reads the gradient once more.
  ops.append(Op("optimizer", (round(count),), 1, 0, 32 * count))
  if width == 2 or part.passes > 1:  # casts, or sums of gradients
    ops.append(Op("weights", (round(count),), part.passes, 0, (12 + width) * count))
  return ops


def _attention_ops(config, sizes, part: Share, flash: bool) -> list[Op]:
  model, width = config.model, itemsize(config)
  D, H, tensor = model.embed_dim, model.head_dim, sizes["tensor"]
  heads, kv = model.num_heads / tensor, max(model.num_kv_heads / tensor, 1)
  calls, full = part.passes * part.layers, model.remat == "full"
  T, L = part.tokens, config.data.seq_len
  ops = [
    _matmul(config, T, D, heads * H, calls, full),
    _matmul(config, T, D, kv * H, 2 * calls, full),
    _matmul(config, T, heads * H, D, calls, full),
  ]
  if model.positions == "rope":
    dims = (max(round(T), 1), max(round(heads + kv), 1), H)
    ops.append(Op("rotary", dims, calls, 0, 4 * math.prod(dims) * width, full / 2))
  # Products of queries with keys and of scores with values: 2 forward, 4 backward, or 5
  # with flash, which computes the scores again. Remat policies that keep dots keep none
  # with batch dimensions, so all of them compute attention again.
  products, again = (7, 2 / 7) if flash else (6, 1 / 3)
  again *= model.remat != "none"
  windows = [window_of(kind, model.sliding_window) for kind in model.layer_pattern]
  queries = max(round(L / sizes["context"]), 1)
  for window in set(windows):
    keys = mean_keys(L, window, model.causal) if flash else L
    repeated = calls * windows.count(window) / len(windows)
    flops = products * 2 * part.rows * queries * heads * keys * H
    moved = 4 * T * (heads + kv) * H * width * 2
    if not flash:  # scores and probabilities in float32, written and read
      moved += 10 * part.rows * queries * heads * keys * 4
    dims = (max(round(part.rows), 1), queries, L, round(heads) or 1, round(kv) or 1, H)
    ops.append(Op("attention", dims, repeated, flops, moved, again))
  return ops


def _mlp_ops(config, sizes, part: Share, full: bool) -> list[Op]:
  model, moe, width = config.model, config.model.moe, itemsize(config)
  D, T, tensor = model.embed_dim, part.tokens, sizes["tensor"]
  sparse = 1 - moe.first_dense_layers / model.num_layers if moe.num_experts else 0.0
  calls = part.passes * part.layers
  matrices = 2 if model.gated_mlp else 1
  ops = []

  def add(tokens, hidden, count, batch=1):
    ops.append(_matmul(config, tokens, D, hidden, matrices * count, full, batch))
    ops.append(_matmul(config, tokens, hidden, D, count, full, batch))
    dims = (max(round(batch * tokens), 1), max(round(hidden), 1))
    moved = (8 if model.gated_mlp else 5) * math.prod(dims) * width
    again = 0.4 if model.remat != "none" else 0.0
    kind = "gated" if model.gated_mlp else "activation"
    ops.append(Op(kind, dims, count, 0, moved, again))

  if sparse < 1:
    add(T, model.mlp_dim / tensor, calls * (1 - sparse))
  if sparse:
    experts = moe.num_experts / sizes["expert"]
    pairs = T * moe.experts_per_token * (moe.capacity_factor or 1.0)
    hidden = (moe.expert_dim or model.mlp_dim) / tensor
    ops.append(_matmul(config, T, D, moe.num_experts, calls * sparse, full))
    add(pairs / experts, hidden, calls * sparse, round(experts))
    # Pairs of token and expert are sorted, gathered and weighted, and put back.
    dims = (max(round(pairs), 1), D)
    moved = 8 * math.prod(dims) * width
    ops.append(Op("dispatch", dims, calls * sparse, 0, moved, 0.5 * full))
    if moe.shared_dim:
      add(T, moe.shared_dim / tensor, calls * sparse)
  return ops


def _head_ops(config, sizes, part: Share) -> list[Op]:
  model = config.model
  D, T, width = model.embed_dim, part.tokens, itemsize(config)
  classes = model.vocab_size if model.head in ("lm", "mlm") else model.num_labels
  classes = max(classes / sizes["tensor"] if config.mesh.rules.vocab else classes, 1)
  rows = max(round(T), 1)
  product = _matmul(config, T, D, classes, part.passes, False)
  chunks = math.ceil(rows / chunk_tokens(rows, math.ceil(classes)))
  if chunks > 1:  # each adds to the gradient of the matrix, in float32
    product = product._replace(bytes=product.bytes + chunks * 2 * 4 * classes * D)
  ops = [product]
  if model.head == "mlm":
    ops.append(_matmul(config, T, D, D, part.passes, False))
  # Float32 logits are written and read twice for the loss, and again for its gradient.
  moved = 6 * rows * classes * 4
  ops.append(Op("logits", (rows, round(classes)), part.passes, 0, moved))
  # A gather, and a scatter into a zeroed gradient of the whole table.
  table = (rows, round(classes), D)
  moved = 4 * rows * D * width + 2 * classes * D * 4
  ops.append(Op("embedding", table, part.passes, 0, moved))
  return ops


def _parameters(config, sizes: dict[str, int]) -> float:
  """Returns the weights that one chip holds, counting matrices only."""
  layer, experts, table = layer_parameters(config)
  ways = {
    axis: sizes[axis] for axis in ("stage", "fsdp", "expert", "context", "tensor")
  }
  everywhere = math.prod(ways.values())
  return (layer + experts + table * ways["stage"]) / everywhere


def layer_parameters(config) -> tuple[float, float, float]:
  """Returns the weights of all layers outside experts, in experts, in embeddings."""
  model, moe, D = config.model, config.model.moe, config.model.embed_dim
  attention = D * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
  matrices = 3 if model.gated_mlp else 2
  sparse = model.num_layers - moe.first_dense_layers if moe.num_experts else 0
  dense = matrices * D * model.mlp_dim * (model.num_layers - sparse)
  dense += sparse * D * (moe.num_experts + matrices * moe.shared_dim)
  hidden = moe.expert_dim or model.mlp_dim
  experts = sparse * matrices * D * hidden * moe.num_experts
  tables = 1 if model.tie_embeddings or model.head not in ("lm", "mlm") else 2
  table = tables * model.vocab_size * D
  if model.positions == "learned":
    table += model.max_len * D
  return attention * model.num_layers + dense, experts, table
