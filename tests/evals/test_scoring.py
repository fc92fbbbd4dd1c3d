"""Packed scoring = one text at a time; neighbours, order and mesh change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxlm.errors import ConfigError, DataError
from flaxlm.evals.requests import (
  ScoreRequest,
  TextSegment,
  causal_segments,
  rolling_requests,
)
from flaxlm.evals.scoring import (
  PLACES,
  Scorer,
  pack_batches,
  pack_rows,
  score_segments,
)
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.mesh import make_mesh
from flaxlm.parallel.sharding import use_mesh

LENGTH, VOCAB = 32, 60  # the embedding has 64 rows


@pytest.fixture(scope="module")
def here(make_tiny):
  """(model, scorer), under the mesh of one device."""
  config = make_tiny()
  model = Transformer(TransformerConfig(**config.model), nnx.Rngs(3))
  # Large weights make the probabilities of tokens differ.
  model = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, model)
  with use_mesh(make_mesh(jax.devices()[:1]), config.mesh.rules.to_dict()):
    yield model, Scorer(model, 4, LENGTH, VOCAB)


def some_requests(count=40, seed=0):
  draw = np.random.default_rng(seed)
  sizes = draw.integers(1, 14, (count, 2))
  return [
    ScoreRequest(*(draw.integers(0, VOCAB, n).tolist() for n in s)) for s in sizes
  ]


def score(here, requests, **options):
  model, scorer = here
  segments = [causal_segments(request, scorer.length) for request in requests]
  flat = [segment for found in segments for segment in found]
  owners = [i for i, found in enumerate(segments) for _ in found]
  return score_segments(scorer, model, flat, owners, **options)


@jax.jit
def run_alone(model, tokens_BL):
  positions_BL = jnp.arange(tokens_BL.shape[1])[None]
  out = model(tokens_BL, positions_BL, jnp.ones_like(tokens_BL))
  return model.logits(out.features)


def loop(model, request):
  """The definition: one request, one row, float64."""
  context, continuation = request
  ids = [*context, *continuation][-(LENGTH + 1) :]
  row = np.zeros((1, LENGTH), np.int32)
  row[0, : len(ids) - 1] = ids[:-1]
  logits = np.asarray(run_alone(model, row)[0], np.float64)[:, :VOCAB]
  total, greedy = 0.0, True
  for i in range(len(ids) - len(continuation), len(ids)):
    at = logits[i - 1] - logits[i - 1].max()
    total += at[ids[i]] - np.log(np.exp(at).sum())
    greedy &= int(np.argmax(at)) == ids[i]
  return total, greedy


def test_sums_are_those_of_a_loop_over_single_requests(here):
  model, requests = here[0], some_requests()
  for request in requests[:3]:  # some are greedy
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(request.context)] = request.context
    logits = run_alone(model, row)[0, len(request.context) - 1, :VOCAB]
    requests.append(ScoreRequest(request.context, [int(np.argmax(logits))]))
  requests.append(ScoreRequest(list(range(50)), [1, 2]))  # is cut on the left
  found = score(here, requests)
  expected = [loop(model, request) for request in requests]
  np.testing.assert_allclose(found.log_p, [x for x, _ in expected], rtol=0, atol=1e-5)
  assert found.greedy.tolist() == [bool(g) for _, g in expected]
  assert found.greedy.any() and not found.greedy.all() and found.complete.all()
  assert 0 < found.padding < 0.3


def test_order_and_neighbours_change_nothing(here):
  requests = some_requests()
  found = score(here, requests)
  order = np.random.default_rng(1).permutation(len(requests))
  shuffled = score(here, [requests[i] for i in order])
  np.testing.assert_allclose(shuffled.log_p, found.log_p[order], rtol=0, atol=1e-5)
  assert shuffled.greedy.tolist() == found.greedy[order].tolist()
  # Another request of the same length takes the same place.
  other = requests[7]
  context = [(i + 1) % VOCAB for i in other.context]
  changed = [*requests[:7], other._replace(context=context), *requests[8:]]
  again = score(here, changed)
  assert again.log_p[7] != found.log_p[7]
  rest = np.arange(len(requests)) != 7
  np.testing.assert_array_equal(again.log_p[rest], found.log_p[rest])


@pytest.mark.parametrize("size", [0, 1, LENGTH, LENGTH + 1, 2 * LENGTH])
def test_rolling_windows_score_each_token_once_after_what_fits(size):
  ids = [100 + i for i in range(size)]
  requests = rolling_requests(ids, [7], LENGTH)
  assert [i for r in requests for i in r.continuation] == ids
  text = [7, *ids]
  for request in requests:
    (segment,) = causal_segments(request, LENGTH)
    end = text.index(request.continuation[-1])
    # The last prediction sees all that a row holds.
    assert segment.tokens.tolist() == text[max(0, end - LENGTH) : end]
  assert len(requests) == -(-size // LENGTH)


def test_a_text_of_several_windows_is_the_sum_of_its_windows(here):
  draw = np.random.default_rng(5)
  ids = draw.integers(0, VOCAB, 2 * LENGTH + 5).tolist()
  requests = rolling_requests(ids, [1], LENGTH)
  total = sum(loop(here[0], request)[0] for request in requests)
  assert np.sum(score(here, requests).log_p) == pytest.approx(total, abs=1e-5)


def test_rows_hold_each_segment_once_and_are_nearly_full():
  lengths = np.random.default_rng(0).integers(2, 30, 500).tolist()
  rows = list(pack_rows(lengths, 64, 4))
  assert sorted(i for row in rows for i in row) == list(range(500))
  assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
  assert sum(lengths) / (64 * len(rows)) > 0.95
  first = {i for row in rows[: len(rows) // 8] for i in row}
  assert max(first) < 80, "early segments are in early batches"
  assert not list(pack_rows([], 64, 4)) and not list(pack_batches([], 4, 64))


def test_an_evaluation_stops_after_a_batch_and_continues_with_the_same_numbers(here):
  requests, done = some_requests(60), []
  whole = score(here, requests)
  part = score(here, requests, on_batch=done.append, should_stop=lambda: len(done) > 1)
  assert len(done) == 2 and 0 < part.complete.sum() < 60
  known = part.complete
  np.testing.assert_array_equal(part.log_p[known], whole.log_p[known])
  calls = []
  rest = score(here, requests, known=done, on_batch=calls.append)
  np.testing.assert_array_equal(rest.log_p, whole.log_p)
  np.testing.assert_array_equal(rest.greedy, whole.greedy)
  assert calls and rest.padding == whole.padding


def test_more_places_than_one_chunk_and_padded_vocabulary(here):
  model, scorer = here
  tokens = np.arange(LENGTH, dtype=np.int32)
  every = TextSegment(tokens, np.arange(LENGTH), np.zeros(LENGTH, np.int32))
  found = score_segments(scorer, model, [every] * 5, range(5))
  assert 5 * LENGTH > PLACES
  np.testing.assert_allclose(found.log_p, found.log_p[0], rtol=1e-6)
  total = 0.0
  for target in range(VOCAB):
    one = TextSegment(tokens, np.array([3]), np.array([target], np.int32))
    total += np.exp(score_segments(scorer, model, [one], [0]).log_p[0])
  assert total == pytest.approx(1, abs=1e-5)  # nothing is left for rows to spare


@pytest.mark.slow
def test_a_mesh_of_eight_devices_gives_the_same(here, make_tiny):
  config, requests = make_tiny(), some_requests()
  found = score(here, requests)
  with use_mesh(make_mesh(data=2, fsdp=2, tensor=2), config.mesh.rules.to_dict()):
    model = jax.device_get(here[0])
    spread = score((model, Scorer(model, 4, LENGTH, VOCAB)), requests)
  np.testing.assert_allclose(spread.log_p, found.log_p, rtol=0, atol=1e-4)
  assert spread.greedy.tolist() == found.greedy.tolist()


def test_what_cannot_be_scored_is_refused(here, make_tiny):
  with pytest.raises(DataError, match=r"item 3 is too long[^$]*33 tokens[^$]*32"):
    causal_segments(ScoreRequest([1], [2] * 33), 32, "item 3")
  config = make_tiny()
  config.model.head, config.model.num_labels, config.model.causal = "sequence", 2, False
  make = lambda: Transformer(TransformerConfig(**config.model), nnx.Rngs(0))  # noqa: E731
  model = jax.eval_shape(make)
  with pytest.raises(ConfigError, match=r"model.head[^$]*sequence"):
    Scorer(model, 4, LENGTH, VOCAB)
  mesh = make_mesh(data=4, context=2)
  with (
    use_mesh(mesh, config.mesh.rules.to_dict()),
    pytest.raises(ConfigError, match=r"mesh\.context"),
  ):
    Scorer(here[0], 4, LENGTH, VOCAB)
