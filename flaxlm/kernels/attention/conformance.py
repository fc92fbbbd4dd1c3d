"""Checks that a kernel computes attention and that no mask leaks; measures its speed.

Each backend is compared with the definition in float64, written in NumPy, which shares
no code with the kernels. Then tokens that others must not see are disturbed: outputs
and gradients of those others must not change by one bit. The tests do this for what a
CPU can run, and `python -m flaxlm.doctor` for the rest, on the user's machine.
"""

import concurrent.futures
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from flaxlm.kernels.attention.attention import attention
from flaxlm.kernels.attention.choice import Case, find_backend, why_not
from flaxlm.kernels.attention.ring import ring_attention, zigzag

LAYOUTS = {"MHA": 4, "GQA": 2, "MQA": 1}  # k/v heads for _NUM_HEADS
_NUM_ROWS, _NUM_HEADS, HEAD_DIM = 3, 4, 64
# The largest difference, as a share of the largest number; inputs are equal bits.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


class Mask(NamedTuple):
  """What tokens see. A row if `packed`: two documents and padding, one, or padding."""

  causal: bool = True
  packed: bool = False
  window: int = 0
  prefix: bool = False
  softcap: float = 0.0
  sinks: bool = False

  def __str__(self) -> str:
    on = [name for name, x in self._asdict().items() if x and name != "causal"]
    return " ".join(["causal" if self.causal else "full", *on])


MASKS = (
  Mask(),
  Mask(packed=True),
  Mask(packed=True, window=50),
  Mask(causal=False),
  Mask(causal=False, packed=True, window=50),
  Mask(packed=True, prefix=True),
  Mask(packed=True, softcap=2.0),
  Mask(packed=True, sinks=True),
  Mask(packed=True, window=50, softcap=2.0, sinks=True),
)


class Result(NamedTuple):
  """What was found for one backend and mask."""

  name: str
  error: float  # the largest, as a share of the largest number of its array
  tolerance: float
  leaks: tuple[str, ...]  # what changed and must not

  @property
  def conforms(self) -> bool:
    return self.error <= self.tolerance and not self.leaks  # NaN does not conform


class Inputs(NamedTuple):
  """The arrays of one case; in NumPy, so that only the kernel is compiled."""

  q_BLNH: np.ndarray
  k_BMKH: np.ndarray
  v_BMKH: np.ndarray
  sinks_N: np.ndarray | None
  dout_BLNH: np.ndarray
  segments_BL: np.ndarray | None
  prefix_BL: np.ndarray | None


def check_all(function: Callable, cases: Iterable[tuple]) -> list[Result]:
  """Runs `check_backend` for each (mask, dtype, layout, length), in threads."""
  with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
    return list(pool.map(lambda case: check_backend(function, *case), cases))


def check_backend(
  function: Callable, mask: Mask, dtype: str, layout: str, length: int
) -> Result:
  """Compares `function(inputs, mask)`, as `kernels` makes it, with the definition."""
  given, expected = _truth(mask, dtype, layout, length)
  # On a CPU most of the time would go into LLVM, whose work is not tested here.
  options = {"xla_backend_optimization_level": 0} if _on_cpu() else {}
  # By default accelerators round float32 to fewer bits before they multiply.
  with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
    wrapped = jax.jit(lambda x: pull(functools.partial(function, mask=mask), x))
    compiled = wrapped.lower(given).compile(options)

    def run(given: Inputs) -> tuple:
      return jax.device_get(compiled(given))

    found = run(given)
    leaks = tuple(_find_leaks(run, given, found, mask))
  error = max(
    np.max(np.abs(np.asarray(x, np.float64) - y)) / np.max(np.abs(y))
    for x, y in zip(found, expected, strict=True)
  )
  return Result(f"{mask}, {dtype}, {layout}", float(error), TOLERANCE[dtype], leaks)


def _on_cpu() -> bool:
  return jax.default_backend() == "cpu"


@functools.lru_cache(maxsize=64)
def _truth(mask: Mask, dtype: str, layout: str, length: int) -> tuple[Inputs, tuple]:
  given = inputs(mask, dtype, layout, length)
  return given, exact(given, mask)


def pull(function: Callable, given: Inputs) -> tuple:
  """Returns the output and the gradients of queries, keys, values and sinks, if any."""

  def out(q, k, v, sinks):
    return function(given._replace(q_BLNH=q, k_BMKH=k, v_BMKH=v, sinks_N=sinks))

  out_BLNH, back = jax.vjp(out, *given[:4])
  gradients = back(given.dout_BLNH)
  return out_BLNH, *gradients[: 3 if given.sinks_N is None else 4]


def inputs(mask: Mask, dtype: str, layout: str, length: int) -> Inputs:
  """Returns the arrays of a case: random, the same on every call."""
  generator = np.random.default_rng(0)

  def heads(number):
    shape = (_NUM_ROWS, length, number, HEAD_DIM)
    return np.asarray(generator.normal(size=shape), np.dtype(jnp.dtype(dtype)))

  K = LAYOUTS[layout]
  q, k, v, dout = heads(_NUM_HEADS), heads(K), heads(K), heads(_NUM_HEADS)
  segments, prefix = np.ones((_NUM_ROWS, length), np.int32), None
  a, b = _borders(length)
  segments[0, a:b], segments[0, b:], segments[2] = 2, 0, 0
  if mask.prefix:
    prefix = np.zeros((_NUM_ROWS, length), np.int32)
    prefix[0, : a // 2] = prefix[0, a : a + 9] = prefix[1, : length // 3] = 1
  sinks = generator.normal(size=_NUM_HEADS).astype(np.float32)
  return Inputs(
    q, k, v, sinks if mask.sinks else None, dout,
    segments if mask.packed else None, prefix,
  )  # fmt: skip


def _borders(length: int) -> tuple[int, int]:
  """Returns where row 0's second document and padding begin: on no block's border."""
  return 2 * length // 5 + 1, 4 * length // 5 + 3


def exact(given: Inputs, mask: Mask) -> tuple:
  """Returns the definition and its gradients, in float64 on the host."""
  # Heads come before tokens for NumPy's matmul, which is faster than its einsum.
  arrays = (*given[:3], given.dout_BLNH)
  q, k, v, dout = (np.asarray(x, np.float64).swapaxes(1, 2) for x in arrays)
  B, N, L, H = q.shape
  groups = N // k.shape[1]
  k_BNMH, v_BNMH = (np.repeat(x, groups, axis=1) for x in (k, v))
  i, j = np.arange(L)[:, None], np.arange(L)[None, :]
  seen_BLM = np.broadcast_to(j <= i if mask.causal else True, (B, L, L))
  if mask.prefix:
    seen_BLM = seen_BLM | (given.prefix_BL[:, None, :] > 0)
  if mask.window:
    seen_BLM = seen_BLM & (abs(i - j) < mask.window)[None]
  if mask.packed:
    ids = given.segments_BL
    seen_BLM = seen_BLM & (ids[:, :, None] == ids[:, None, :])
  scores = q @ k_BNMH.swapaxes(2, 3) * H**-0.5
  if mask.softcap:
    scores = mask.softcap * np.tanh(scores / mask.softcap)
  powers = np.exp(scores) * seen_BLM[:, None]  # no overflow: these scores are small
  total = powers.sum(-1, keepdims=True)
  if mask.sinks:
    sink_1N11 = np.exp(given.sinks_N.astype(np.float64))[None, :, None, None]
    total = total + sink_1N11
  weights = powers / total
  dweights = dout @ v_BNMH.swapaxes(2, 3)
  delta = (weights * dweights).sum(-1, keepdims=True)
  dscores = weights * (dweights - delta) * H**-0.5
  if mask.softcap:
    dscores = dscores * (1 - (scores / mask.softcap) ** 2)
  dk, dv = dscores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dout
  dk, dv = (x.reshape(B, N // groups, groups, L, H).sum(2) for x in (dk, dv))
  found = (weights @ v_BNMH, dscores @ k_BNMH, dk, dv)
  found = tuple(x.swapaxes(1, 2) for x in found)
  if not mask.sinks:
    return found
  return *found, -(sink_1N11 / total * delta).sum((0, 2, 3))


def _find_leaks(
  run: Callable, given: Inputs, found: tuple, mask: Mask
) -> Iterator[str]:
  """Yields what changes when tokens that it must not see are disturbed."""
  L = given.q_BLNH.shape[1]
  a, b = _borders(L)
  spans = {"first": slice(0, a), "second": slice(a, b), "padding": slice(b, L)}
  if mask.packed:  # documents of row 0
    for name, span in spans.items():
      moved = run(_disturb(given, 0, span))
      for other, place in spans.items():
        if other != name:
          yield from _differences(f"{name} in {other}", found, moved, 0, place)
  if mask.causal:  # row 1 is one document; the disturbed part has no loss
    past, future = slice(0, L // 2 + 1), slice(L // 2 + 1, L)
    dout_BLNH = given.dout_BLNH.copy()
    dout_BLNH[1, future] = 0
    silent = given._replace(dout_BLNH=dout_BLNH)
    moved = run(_disturb(silent, 1, future)._replace(dout_BLNH=dout_BLNH))
    yield from _differences("the future", run(silent), moved, 1, past)


def _disturb(given: Inputs, row: int, span: slice) -> Inputs:
  """Returns the inputs with other numbers for the tokens of `span`."""

  def other(x, factor, shift):
    x = x.copy()
    x[row, span] = x[row, span] * x.dtype.type(factor) + x.dtype.type(shift)
    return x

  return given._replace(
    q_BLNH=other(given.q_BLNH, -2.0, 1.0),
    k_BMKH=other(given.k_BMKH, -3.0, 2.0),
    v_BMKH=other(given.v_BMKH, 5.0, 1e4),
    dout_BLNH=other(given.dout_BLNH, -7.0, 1.0),
  )


def _differences(what: str, before, after, row: int, place: slice) -> Iterator[str]:
  names = ("output", "gradient of q", "gradient of k", "gradient of v")
  for name, x, y in zip(names, before, after, strict=False):
    if not np.array_equal(x[row, place], y[row, place]):
      yield f"{what}: {name}"


def kernels(backend: str, interpret: bool = False) -> Callable:
  """Returns `function(inputs, mask)` that computes attention by a backend."""

  def compute(given: Inputs, mask: Mask):
    ids = given.segments_BL
    return attention(
      *given[:3], q_segment_ids_BL=ids, k_segment_ids_BM=ids,
      k_prefix_BM=given.prefix_BL, sinks_N=given.sinks_N, causal=mask.causal,
      window=mask.window, softcap=mask.softcap, backend=backend, interpret=interpret,
    )  # fmt: skip

  return _on_ring if find_backend(backend).splits_rows else compute


def _on_ring(given: Inputs, mask: Mask) -> jax.Array:
  """Computes attention on a ring of the devices here, at most four."""
  devices = jax.devices()[:4]
  order = zigzag(given.q_BLNH.shape[1], len(devices))
  mesh = jax.sharding.Mesh(devices, "context", axis_types=(AxisType.Auto,))

  def local(q, k, v, ids, prefix, sinks):
    return ring_attention(
      q, k, v, axis_name="context", q_segment_ids_Bl=ids, k_segment_ids_Bm=ids,
      k_prefix_Bm=prefix, sinks_N=sinks, causal=mask.causal, window=mask.window,
      softcap=mask.softcap, block_size=32,
    )  # fmt: skip

  rows = PartitionSpec(None, "context")
  ring = jax.shard_map(
    local, mesh=mesh, in_specs=(*(rows,) * 5, PartitionSpec()), out_specs=rows,
    check_vma=False,
  )  # fmt: skip
  arrays = (*given[:3], given.segments_BL, given.prefix_BL)
  dealt = (None if x is None else x[:, order] for x in arrays)
  return ring(*dealt, given.sinks_N)[:, np.argsort(order)]


def case_of(mask: Mask, dtype: str, length: int, platform: str) -> Case:
  return Case(
    platform, dtype, length, length, HEAD_DIM, mask.softcap, mask.prefix, mask.sinks
  )


def cases(backend: str, length: int, platform: str) -> Iterator[tuple]:
  """Yields (mask, dtype, layout, length) of each case that a backend says it computes.

  Each mask is tried with each dtype, and with the layouts in turn. Only the last mask
  is tried with all layouts: whatever the mask, heads are a batch dimension to every
  kernel here. For the reference, a few cases are enough.
  """
  names = list(LAYOUTS)
  masks = (MASKS[0], MASKS[-1]) if backend == "reference" else MASKS
  for i, mask in enumerate(masks):
    for j, dtype in enumerate(TOLERANCE):
      full = mask == MASKS[-1] and dtype == "float32"
      if why_not(backend, case_of(mask, dtype, length, platform)) is None:
        layouts = names if full else [names[(i + j) % len(names)]]
        yield from ((mask, dtype, layout, length) for layout in layouts)


def examine(backend: str, platform: str) -> dict:
  """Checks every case that `backend` can compute here, and measures its speed.

  Returns:
    Values for JSON: the number of `checked` cases, descriptions of the `failed` ones,
    whether it `conforms`, the largest `error` as a share of its tolerance, and `tflops`
    by row length; if nothing can run here, what it `needs`.
  """
  length = 384 if platform == "tpu" else 160  # several blocks of each kernel
  dtype = "float32" if platform == "cpu" else "bfloat16"
  needs = why_not(backend, case_of(MASKS[0], dtype, length, platform))
  row = find_backend(backend)
  if row.splits_rows and jax.device_count() == 1:
    needs = "more than one device"
  if needs:
    return {"checked": 0, "needs": needs}
  kernel = kernels(backend)
  results = check_all(kernel, cases(backend, length, platform))
  failed = [
    f"{r.name}: error {r.error:.1e} of {r.tolerance:.0e}; {', '.join(r.leaks)}"
    for r in results
    if not r.conforms
  ]
  lengths = (256, 512, 1024) if platform == "cpu" else (1024, 2048, 4096, 8192)
  speeds = {}
  if row.timed:
    speeds = {str(L): teraflops(backend, L, dtype) for L in lengths}
  return {
    "checked": len(results),
    "failed": failed,
    "conforms": not failed,
    "error": max(r.error / r.tolerance for r in results),
    "tflops": speeds,
  }


def teraflops(backend: str, L: int, dtype: str, seconds: float = 0.4) -> float:
  """Returns TFLOP/s of causal attention, forward and backward, for GPT-2 124M's heads.

  Counts the products of visible scores: 2 forward and 5 backward (FlashAttention-2).
  """
  B, N, H = max(1, 8192 // L) if not _on_cpu() else 1, 12, 64
  q, k, v, dout = jax.random.normal(jax.random.key(0), (4, B, L, N, H), dtype)
  given = Inputs(q, k, v, None, dout, None, None)
  run = jax.jit(
    functools.partial(pull, functools.partial(kernels(backend), mask=Mask()))
  )
  jax.block_until_ready(run(given))
  best, end = float("inf"), time.perf_counter() + seconds
  while best == float("inf") or time.perf_counter() < end:
    start = time.perf_counter()
    jax.block_until_ready(run(given))
    best = min(best, time.perf_counter() - start)
  return 7 * 2 * B * N * H * L * L / 2 / best / 1e12
