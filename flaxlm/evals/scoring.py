"""Scores segments of text with one compiled program of one shape.

Segments share rows of fixed length. That is exact, because no token sees another
segment. Logits, the largest arrays, exist only where something is predicted, for a few
places at a time. Each batch is a function of the segments alone, so an evaluation that
was killed continues with the same batches.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flaxlm.errors import ConfigError
from flaxlm.evals.requests import TextSegment
from flaxlm.models.moe import without_capacity
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.placement import batch_sharding, local_rows, to_global
from flaxlm.parallel.sharding import current_layout

PLACES = 128  # whose logits exist at once
_PACKED_TOGETHER = 2  # batches whose segments are sorted, so that rows are full


class Predictions(NamedTuple):
  """What is known of each prediction of a batch, in the order of its places."""

  log_p: np.ndarray  # float32, nats
  greedy: np.ndarray  # bool: the target is the likeliest token, the first one of equals


class Batch(NamedTuple):
  """Rows of segments, with the places whose features predict."""

  rows: dict[str, np.ndarray]  # int32 BL: tokens, segment_ids from 1, positions
  places: np.ndarray  # int32: row * L + column
  targets: np.ndarray  # int32
  owners: np.ndarray  # the number of the segment that each place belongs to


class Scores(NamedTuple):
  """Sums over the predictions of each owner; float64."""

  log_p: np.ndarray
  greedy: np.ndarray  # bool: all predictions are
  complete: np.ndarray  # bool: all of its segments were scored
  padding: float  # share of the places in the batches that hold no token


def pack_rows(
  lengths: Sequence[int], length: int, batch_rows: int
) -> Iterator[list[int]]:
  """Yields the numbers of the segments in each row.

  Each row takes what fits, longest first, among the segments of about two batches. So
  early segments are in early batches, and nothing waits until all are packed.
  """
  waiting, start = [], 0
  while waiting or start < len(lengths):
    tokens = sum(lengths[i] for i in waiting)
    while start < len(lengths) and tokens < _PACKED_TOGETHER * batch_rows * length:
      waiting.append(start)
      tokens, start = tokens + lengths[start], start + 1
    rows, room = [], []
    for i in sorted(waiting, key=lambda i: (-lengths[i], i)):
      at = next((r for r, left in enumerate(room) if left >= lengths[i]), len(room))
      if at == len(room):
        rows.append([])
        room.append(length)
      rows[at].append(i)
      room[at] -= lengths[i]
    # The last row is the emptiest: what it holds is packed with what comes.
    waiting = rows.pop() if start < len(lengths) else []
    yield from rows


def pack_batches(
  segments: Sequence[TextSegment], batch_rows: int, length: int
) -> Iterator[Batch]:
  """Yields the segments in batches of `batch_rows` rows of `length` tokens."""
  rows = pack_rows([len(s.tokens) for s in segments], length, batch_rows)
  while own := list(itertools.islice(rows, batch_rows)):
    arrays = {
      name: np.zeros((batch_rows, length), np.int32)
      for name in ("tokens", "segment_ids", "positions")
    }
    places, targets, owners = [], [], []
    for r, row in enumerate(own):
      at = 0
      for number, i in enumerate(row, 1):
        segment = segments[i]
        here = slice(at, at + len(segment.tokens))
        arrays["tokens"][r, here] = segment.tokens
        arrays["segment_ids"][r, here] = number
        arrays["positions"][r, here] = np.arange(len(segment.tokens))
        places.append(r * length + at + segment.places)
        targets.append(segment.targets)
        owners.append(np.full(len(segment.places), i))
        at = here.stop
    joined = (np.concatenate(parts).astype(np.int32) for parts in (places, targets))
    yield Batch(arrays, *joined, np.concatenate(owners))


class Scorer:
  """Runs batches of one shape; made and called under `use_mesh`.

  Args:
    batch_rows, length: the shape. The mesh must divide it as it divides a batch.
    vocab_size: the tokenizer's; further rows of the embedding get no probability.
  Raises:
    ConfigError: the model predicts no tokens, or the mesh splits rows.
  """

  def __init__(self, model: Transformer, batch_rows: int, length: int, vocab_size: int):
    layout, head = current_layout(), model.config.head
    assert layout is not None, "make a Scorer under use_mesh"
    if head not in ("lm", "mlm"):
      needed = "lm or mlm: a model that predicts tokens"
      raise ConfigError("config.model.head", head, needed)
    if layout.ways("length") > 1:
      needed = "1 to score tasks: they are scored in whole rows"
      raise ConfigError("config.mesh.context", layout.ways("length"), needed)
    self.batch_rows, self.length = batch_rows, length
    self._sharding = batch_sharding(layout.rules, layout.mesh)
    self._first, self._stop = local_rows(self._sharding, batch_rows)
    replicated = NamedSharding(layout.mesh, PartitionSpec())
    score = functools.partial(_score_places, vocab_size)
    self._program = jax.jit(score, out_shardings=replicated)

  def __call__(self, model: Transformer, batch: Batch) -> Predictions:
    """Returns the predictions of a batch, on every host."""
    local = {name: x[self._first : self._stop] for name, x in batch.rows.items()}
    rows = to_global(local, self._first, self.batch_rows, self._sharding)
    count = len(batch.places)
    size = -(-self.batch_rows * self.length // PLACES) * PLACES
    padded = np.zeros((2, size), np.int32)
    padded[0, :count], padded[1, :count] = batch.places, batch.targets
    chunks = np.int32(-(-count // PLACES))
    log_p, greedy = self._program(model, rows, *padded, chunks)
    return Predictions(np.asarray(log_p)[:count], np.asarray(greedy)[:count])

  def warm_up(self, model: Transformer) -> None:
    """Compiles the program, so that a time budget does not pay for it."""
    segment = TextSegment(
      np.zeros(1, np.int32), np.zeros(1, int), np.zeros(1, np.int32)
    )
    self(model, next(pack_batches([segment], self.batch_rows, self.length)))


def _score_places(
  vocab_size: int, model: Transformer, rows, places_P, targets_P, chunks
):
  """Returns (log p, whether greedy) of the first `chunks` x PLACES places; P each."""
  model = without_capacity(model)
  x_BLD = model(rows["tokens"], rows["positions"], rows["segment_ids"]).features
  length = x_BLD.shape[1]
  is_padding_V = jnp.arange(model.config.vocab_size) >= vocab_size

  def step(i, found):
    here = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=PLACES)
    places_C, targets_C = (here(x, i * PLACES) for x in (places_P, targets_P))
    x_CD = x_BLD[places_C // length, places_C % length]
    logits_CV = model.logits(x_CD[None])[0].astype(jnp.float32)
    logits_CV = jnp.where(is_padding_V[None, :], -jnp.inf, logits_CV)
    chosen_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1)[:, 0]
    log_p_C = chosen_C - jax.nn.logsumexp(logits_CV, axis=1)
    greedy_C = jnp.argmax(logits_CV, axis=1) == targets_C
    return tuple(
      jax.lax.dynamic_update_slice_in_dim(whole, part, i * PLACES, 0)
      for whole, part in zip(found, (log_p_C, greedy_C), strict=True)
    )

  shape = places_P.shape
  empty = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool)
  return jax.lax.fori_loop(0, chunks, step, empty)


def score_segments(
  scorer: Scorer,
  model: Transformer,
  segments: Sequence[TextSegment],
  owners: Sequence[int],
  known: Sequence[Predictions] = (),
  on_batch: Callable[[Predictions], None] = lambda predictions: None,
  should_stop: Callable[[], bool] = lambda: False,
) -> Scores:
  """Returns the sums over the predictions of each owner of segments.

  Args:
    owners: the number of each segment's owner, from 0, such as a request.
    known: predictions of the first batches, which are not computed again.
    on_batch: called with what was computed.
    should_stop: asked after every batch that was computed.
  """
  count = max(owners, default=-1) + 1
  owners = np.asarray(owners, int)
  log_p, wrong = np.zeros(count), np.zeros(count)
  left = np.bincount(owners, minlength=count)
  batches = pack_batches(segments, scorer.batch_rows, scorer.length)
  tokens = done = 0
  for number, batch in enumerate(batches):
    if number < len(known):
      predictions = known[number]
    else:
      predictions = scorer(model, batch)
      on_batch(predictions)
    whose = owners[batch.owners]
    np.add.at(log_p, whose, predictions.log_p.astype(np.float64))
    np.add.at(wrong, whose, ~predictions.greedy)
    left -= np.bincount(owners[np.unique(batch.owners)], minlength=count)
    tokens += int(np.sum(batch.rows["segment_ids"] > 0))
    done += 1
    if number >= len(known) and should_stop():
      break
  places = max(done * scorer.batch_rows * scorer.length, 1)
  return Scores(log_p, wrong == 0, left == 0, 1 - tokens / places)
