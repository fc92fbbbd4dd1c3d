"""A training step as a list of operations: what one chip computes, and what it moves.

The list follows models/transformer.py: each matrix product with its two gradients, each
attention, and the passes over memory between them. roofline.py gives each its seconds.
"""

import math
from typing import NamedTuple

from flaxlm.kernels.cross_entropy import chunk_tokens
from flaxlm.models.cost import mean_keys


class Op(NamedTuple):
  """One operation, forward and backward together."""

  kind: str  # matmul | attention | one of planning/probes.py:PROBES
  dims: tuple[int, ...]  # what planning/probes.py needs to measure it
  count: float  # times a step, on each chip
  flops: float  # of one
  bytes: float  # to and from memory, of one
  again: float = 0.0  # share of one that the backward pass computes once more (remat)


class Share(NamedTuple):
  """What a chip has of a step."""

  rows: float  # a pass
  tokens: float  # a pass: rows x the length that it holds
  passes: int  # of accumulation, times those of the pipeline
  layers: float
  ticks: int  # a pass that is pipelined takes so many, of which `passes` are work


def share(config, sizes: dict[str, int]) -> Share:
  """Rows, tokens and layers of each chip; `sizes` has no -1."""
  replicas = math.prod(sizes[axis] for axis in ("slice", "data", "fsdp", "expert"))
  accumulation, stages = config.step.accumulation_steps, sizes["stage"]
  waves = (config.mesh.microbatches or stages) if stages > 1 else 1
  passes = accumulation * waves
  rows = config.data.batch_size / replicas / passes
  tokens = rows * config.data.seq_len / sizes["context"]
  ticks = waves * config.mesh.stage_repeats + stages - 1 if stages > 1 else 1
  return Share(rows, tokens, passes, config.model.num_layers / stages, ticks)


def itemsize(config) -> int:
  return 2 if config.model.dtype == "bfloat16" else 4


def matmul(config, tokens, k, n, count, again, batch=1) -> Op:
  """`batch` products of (tokens, k) with (k, n), and both gradients."""
  m, k, n = (max(round(x), 1) for x in (tokens, k, n))
  moved = 3 * batch * (m * k + k * n + m * n) * itemsize(config)
  return Op("matmul", (batch, m, k, n), count, 6 * batch * m * k * n, moved, again / 3)


def operations(config, sizes: dict[str, int], flash: bool) -> list[Op]:
  """All operations of a step on one chip.

  Args:
    flash: attention computes visible blocks only and keeps no scores in memory.
  """
  model, part = config.model, share(config, sizes)
  full = model.remat == "full"
  ops = attention_ops(config, sizes, part, flash)
  ops += mlp_ops(config, sizes, part, full)
  ops += head_ops(config, sizes, part)
  width = itemsize(config)
  T, D = max(round(part.tokens), 1), model.embed_dim
  calls = part.passes * part.layers
  # Forward: read the stream and what is added, write both; backward: about twice.
  norm = 10 * T * D * width
  ops.append(Op("norm", (T, D), 2 * calls + part.passes, 0, norm, 0.3 * full))
  count = parameters(config, sizes)
  # AdamW reads weight, gradient and two moments, writes three: 28 bytes; the norm reads
  # the gradient once more.
  ops.append(Op("optimizer", (round(count),), 1, 0, 32 * count))
  if width == 2 or part.passes > 1:  # casts; sums of gradients
    ops.append(Op("weights", (round(count),), part.passes, 0, (12 + width) * count))
  return ops


def attention_ops(config, sizes, part: Share, flash: bool) -> list[Op]:
  model, width = config.model, itemsize(config)
  D, H, tensor = model.embed_dim, model.head_dim, sizes["tensor"]
  heads, kv = model.num_heads / tensor, max(model.num_kv_heads / tensor, 1)
  calls, full = part.passes * part.layers, model.remat == "full"
  T, L = part.tokens, config.data.seq_len
  ops = [
    matmul(config, T, D, heads * H, calls, full),
    matmul(config, T, D, kv * H, 2 * calls, full),
    matmul(config, T, heads * H, D, calls, full),
  ]
  if model.positions == "rope":
    dims = (max(round(T), 1), max(round(heads + kv), 1), H)
    ops.append(Op("rotary", dims, calls, 0, 4 * math.prod(dims) * width, full / 2))
  # Products of queries with keys and of weights with values: 2 forward, 4 backward;
  # flash recomputes the scores: 5. Policies that keep dots keep none with batch
  # dimensions, so attention is computed again by all of them.
  products, again = (7, 2 / 7) if flash else (6, 1 / 3)
  again *= model.remat != "none"
  windows = [model.sliding_window * (kind == "local") for kind in model.layer_pattern]
  queries = max(round(L / sizes["context"]), 1)
  for window in set(windows):
    keys = mean_keys(L, window, model.causal) if flash else L
    repeated = calls * windows.count(window) / len(windows)
    flops = products * 2 * part.rows * queries * heads * keys * H
    moved = 4 * T * (heads + kv) * H * width * 2
    if not flash:  # scores and probabilities, float32, there and back
      moved += 10 * part.rows * queries * heads * keys * 4
    dims = (max(round(part.rows), 1), queries, L, round(heads) or 1, round(kv) or 1, H)
    ops.append(Op("attention", dims, repeated, flops, moved, again))
  return ops


def mlp_ops(config, sizes, part: Share, full: bool) -> list[Op]:
  model, moe, width = config.model, config.model.moe, itemsize(config)
  D, T, tensor = model.embed_dim, part.tokens, sizes["tensor"]
  sparse = 1 - moe.first_dense_layers / model.num_layers if moe.num_experts else 0.0
  calls = part.passes * part.layers
  matrices = 2 if model.gated_mlp else 1
  ops = []

  def add(tokens, hidden, count, batch=1):
    ops.append(matmul(config, tokens, D, hidden, matrices * count, full, batch))
    ops.append(matmul(config, tokens, hidden, D, count, full, batch))
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
    ops.append(matmul(config, T, D, moe.num_experts, calls * sparse, full))
    add(pairs / experts, hidden, calls * sparse, round(experts))
    # Sorting, gathering and weighing the pairs, there and back.
    dims = (max(round(pairs), 1), D)
    moved = 8 * math.prod(dims) * width
    ops.append(Op("dispatch", dims, calls * sparse, 0, moved, 0.5 * full))
    if moe.shared_dim:
      add(T, moe.shared_dim / tensor, calls * sparse)
  return ops


def head_ops(config, sizes, part: Share) -> list[Op]:
  model = config.model
  D, T, width = model.embed_dim, part.tokens, itemsize(config)
  words = model.vocab_size if model.head in ("lm", "mlm") else model.num_labels
  words = max(words / sizes["tensor"] if config.mesh.rules.vocab else words, 1)
  rows = max(round(T), 1)
  product = matmul(config, T, D, words, part.passes, False)
  chunks = math.ceil(rows / chunk_tokens(rows, math.ceil(words)))
  if chunks > 1:  # each adds to the gradient of the matrix, in float32
    product = product._replace(bytes=product.bytes + chunks * 2 * 4 * words * D)
  ops = [product]
  if model.head == "mlm":
    ops.append(matmul(config, T, D, D, part.passes, False))
  # Logits in float32: written, read twice for the loss, and so again for the gradient.
  moved = 6 * rows * words * 4
  ops.append(Op("logits", (rows, round(words)), part.passes, 0, moved))
  # A gather, and a scatter into a gradient of the whole table that starts as zeros.
  table = (rows, round(words), D)
  moved = 4 * rows * D * width + 2 * words * D * 4
  ops.append(Op("embedding", table, part.passes, 0, moved))
  return ops


def parameters(config, sizes: dict[str, int]) -> float:
  """Weights that a chip holds, matrices only: what optimizer and gradients touch."""
  layer, experts, table = layer_parameters(config)
  ways = {
    axis: sizes[axis] for axis in ("stage", "fsdp", "expert", "context", "tensor")
  }
  everywhere = math.prod(ways.values())
  return (layer + experts + table * ways["stage"]) / everywhere


def layer_parameters(config) -> tuple[float, float, float]:
  """Weights of all layers outside of experts, in experts, and in the word tables."""
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
