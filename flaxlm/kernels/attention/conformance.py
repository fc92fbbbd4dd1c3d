"""Does a kernel compute attention, and does no mask leak? With its speed beside it.

Each backend is compared with the definition in float64, written in NumPy and sharing no
code with the kernels. Then tokens are disturbed that others must not see: the outputs
and gradients of those others may not move by one bit. The tests run this for what a CPU
can run, `python -m flaxlm.doctor` on the user's machine for the rest.
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

LAYOUTS = {"MHA": 4, "GQA": 2, "MQA": 1}  # k/v heads for NUM_HEADS
NUM_ROWS, NUM_HEADS, HEAD_DIM = 3, 4, 64
# The largest difference, as a share of the largest number; inputs are the same bits.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


class Mask(NamedTuple):
  """What tokens see. Rows of `packed`: two documents and padding; one; padding."""

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
  """Of one backend and mask."""

  name: str
  error: float  # the largest, as a share of the largest number of its array
  tolerance: float
  leaks: tuple[str, ...]  # which numbers moved that must not

  @property
  def conforms(self) -> bool:
    return self.error <= self.tolerance and not self.leaks  # a NaN does not


class Inputs(NamedTuple):
  """In NumPy, so that nothing but the kernel is compiled."""

  q_BLNH: np.ndarray
  k_BMKH: np.ndarray
  v_BMKH: np.ndarray
  sinks_N: np.ndarray | None
  dout_BLNH: np.ndarray
  segments_BL: np.ndarray | None
  prefix_BL: np.ndarray | None


def check_all(function: Callable, cases: Iterable[tuple]) -> list[Result]:
  """`check` for each (mask, dtype, layout, length); compilers run side by side."""
  with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
    return list(pool.map(lambda case: check_backend(function, *case), cases))


def check_backend(
  function: Callable, mask: Mask, dtype: str, layout: str, length: int
) -> Result:
  """Compares `function(inputs, mask)`, as `kernels` gives it, with the definition."""
  given, expected = truth(mask, dtype, layout, length)
  # On a CPU most of the time would go into LLVM, which changes nothing that is tested.
  options = {"xla_backend_optimization_level": 0} if on_cpu() else {}
  # Accelerators would round float32 to fewer bits before they multiply.
  with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
    wrapped = jax.jit(lambda x: pull(functools.partial(function, mask=mask), x))
    compiled = wrapped.lower(given).compile(options)

    def run(given: Inputs) -> tuple:
      return jax.device_get(compiled(given))

    found = run(given)
    leaks = tuple(leaked(run, given, found, mask))
  error = max(
    np.max(np.abs(np.asarray(x, np.float64) - y)) / np.max(np.abs(y))
    for x, y in zip(found, expected, strict=True)
  )
  return Result(f"{mask}, {dtype}, {layout}", float(error), TOLERANCE[dtype], leaks)


def on_cpu() -> bool:
  return jax.default_backend() == "cpu"


@functools.lru_cache(maxsize=64)
def truth(mask: Mask, dtype: str, layout: str, length: int) -> tuple[Inputs, tuple]:
  given = inputs(mask, dtype, layout, length)
  return given, exact(given, mask)


def pull(function: Callable, given: Inputs) -> tuple:
  """The output, and the gradients of queries, keys, values and (if any) sinks."""

  def out(q, k, v, sinks):
    return function(given._replace(q_BLNH=q, k_BMKH=k, v_BMKH=v, sinks_N=sinks))

  out_BLNH, back = jax.vjp(out, *given[:4])
  gradients = back(given.dout_BLNH)
  return out_BLNH, *gradients[: 3 if given.sinks_N is None else 4]


def inputs(mask: Mask, dtype: str, layout: str, length: int) -> Inputs:
  generator = np.random.default_rng(0)

  def heads(number):
    shape = (NUM_ROWS, length, number, HEAD_DIM)
    return np.asarray(generator.normal(size=shape), np.dtype(jnp.dtype(dtype)))

  K = LAYOUTS[layout]
  q, k, v, dout = heads(NUM_HEADS), heads(K), heads(K), heads(NUM_HEADS)
  segments, prefix = np.ones((NUM_ROWS, length), np.int32), None
  a, b = borders(length)
  segments[0, a:b], segments[0, b:], segments[2] = 2, 0, 0
  if mask.prefix:
    prefix = np.zeros((NUM_ROWS, length), np.int32)
    prefix[0, : a // 2] = prefix[0, a : a + 9] = prefix[1, : length // 3] = 1
  sinks = generator.normal(size=NUM_HEADS).astype(np.float32)
  return Inputs(
    q, k, v, sinks if mask.sinks else None, dout,
    segments if mask.packed else None, prefix,
  )  # fmt: skip


def borders(length: int) -> tuple[int, int]:
  """Where the second document of row 0 begins, and its padding: no block does there."""
  return 2 * length // 5 + 1, 4 * length // 5 + 3


def exact(given: Inputs, mask: Mask) -> tuple:
  """The definition and its gradients, in float64 on the host."""
  # All with heads before tokens: NumPy's matmul is fast, its einsum is not.
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
  powers = np.exp(scores) * seen_BLM[:, None]  # scores of these inputs are small
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


def leaked(run: Callable, given: Inputs, found: tuple, mask: Mask) -> Iterator[str]:
  """Yields the name of each number that moves with tokens that it must not see."""
  L = given.q_BLNH.shape[1]
  a, b = borders(L)
  spans = {"first": slice(0, a), "second": slice(a, b), "padding": slice(b, L)}
  if mask.packed:  # documents of row 0
    for name, span in spans.items():
      moved = run(disturb(given, 0, span))
      for other, place in spans.items():
        if other != name:
          yield from differ(f"{name} in {other}", found, moved, 0, place)
  if mask.causal:  # row 1 is one document; no loss comes from what is disturbed
    past, future = slice(0, L // 2 + 1), slice(L // 2 + 1, L)
    dout_BLNH = given.dout_BLNH.copy()
    dout_BLNH[1, future] = 0
    silent = given._replace(dout_BLNH=dout_BLNH)
    moved = run(disturb(silent, 1, future)._replace(dout_BLNH=dout_BLNH))
    yield from differ("the future", run(silent), moved, 1, past)


def disturb(given: Inputs, row: int, span: slice) -> Inputs:
  """Other numbers in all that these tokens have."""

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


def differ(what: str, before, after, row: int, place: slice) -> Iterator[str]:
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

  return on_ring if find_backend(backend).splits_rows else compute


def on_ring(given: Inputs, mask: Mask) -> jax.Array:
  """Attention by a ring of all devices here, at most four."""
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
  """Yields (mask, dtype, layout, length) of what a backend says it can compute.

  Each mask meets each dtype, and the layouts by turns; the last mask meets all: heads
  are a dimension of batch to every kernel here, whatever the mask. The reference is
  what is compared with: a few.
  """
  names = list(LAYOUTS)
  masks = (MASKS[0], MASKS[-1]) if backend == "reference" else MASKS
  for i, mask in enumerate(masks):
    for j, dtype in enumerate(TOLERANCE):
      full = mask == MASKS[-1] and dtype == "float32"
      if why_not(backend, case_of(mask, dtype, length, platform)) is None:
        turn = names if full else [names[(i + j) % len(names)]]
        yield from ((mask, dtype, layout, length) for layout in turn)


def examine(backend: str, platform: str) -> dict:
  """Checks every case that `backend` can compute here, and measures its speed.

  Returns:
    Plain values: `checked` cases, the `failed` ones in words, whether it `conforms`,
    the largest `error` as a share of its tolerance, `tflops` by the length of a row;
    where nothing can run, what it `needs`.
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
  """The speed of causal attention, forward and backward, with the heads of GPT-2 124M.

  Counts the products of visible scores, 2 forward and 5 backward (FlashAttention-2).
  """
  B, N, H = max(1, 8192 // L) if not on_cpu() else 1, 12, 64
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
