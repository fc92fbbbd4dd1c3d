"""Objectives: hidden tokens can be put back, and targets are never visible."""

import itertools

import numpy as np
import pytest

from flaxlm.data.batches import masking, spans
from flaxlm.data.batches.masking import Objective, SpecialIds
from flaxlm.errors import ConfigError

V, TEXT = 200, 150  # ids of the model and of the tokenizer
BOS, EOS, MASK, CLS, SEP, PRE, MID, SUF = range(1, 9)
SPECIAL = SpecialIds(BOS, EOS, MASK, CLS, SEP, PRE, MID, SUF)
CONTINUES = np.random.default_rng(0).random(TEXT) < 0.4


def vocabulary(objective, **changes):
  arguments = {
    "vocab_size": V,
    "text_size": TEXT,
    "special": SPECIAL,
    "control_ids": (0, 9),
    "continues_word": CONTINUES,
  }
  return masking.make_vocabulary(objective, **arguments | changes)


def generator(seed=0):
  return np.random.Generator(np.random.Philox(key=seed))


def draw_documents(rng, size):
  """Returns `size` tokens cut from a stream of documents of any length."""
  parts = []
  while sum(map(len, parts)) < size + 60:
    text = rng.integers(10, TEXT, int(rng.choice([0, 1, 2, 7, 30, 100])))
    parts.append(np.concatenate([[BOS], text, [EOS]]))
  ids = np.concatenate(parts)[int(rng.integers(0, 60)) :][:size]
  starts = np.flatnonzero(ids == BOS)
  return [part.astype(np.int32) for part in np.split(ids, starts[starts > 0])]


def fill_in(segment):
  """Returns the document from which `corrupt_spans` made a segment."""
  given = segment.tokens[segment.prefix == 1]
  asked = segment.tokens[segment.prefix == 0]
  hidden, open_spans = {}, []
  for token in asked.tolist():
    if token >= TEXT:
      open_spans.append(token)
      hidden[token] = []
    else:
      hidden[open_spans[-1]].append(token)
  assert open_spans == list(range(V - 1, V - 1 - len(open_spans), -1))
  if open_spans:
    assert hidden.pop(open_spans[-1]) == []  # the last one ends the target
    assert all(hidden.values())
    assert [t for t in given.tolist() if t >= TEXT] == open_spans[:-1]
  filled = [hidden.get(t, [t]) for t in given.tolist()]
  return list(itertools.chain.from_iterable(filled))


def put_back(tokens):
  """Returns the document from which `fill_in_middle` made a segment."""
  tokens = tokens.tolist()
  if PRE not in tokens:
    return tokens
  at = {symbol: tokens.index(symbol) for symbol in (PRE, SUF, MID)}
  assert all(tokens.count(symbol) == 1 for symbol in at)
  assert at[PRE] < at[SUF] < at[MID]
  head = tokens[: at[PRE]]
  prefix = tokens[at[PRE] + 1 : at[SUF]]
  suffix = tokens[at[SUF] + 1 : at[MID]]
  rest = tokens[at[MID] + 1 :]
  tail = rest[-1:] if rest[-1:] == [EOS] else []
  return head + prefix + rest[: len(rest) - len(tail)] + suffix + tail


def assert_nothing_leaks(row):
  """Each target is the next token of its document, and no position sees its own."""
  tokens, targets, segments = (row[k] for k in ("tokens", "targets", "segment_ids"))
  asked = np.flatnonzero(targets[:-1] >= 0)
  np.testing.assert_array_equal(tokens[asked + 1], targets[asked])
  np.testing.assert_array_equal(segments[asked + 1], segments[asked])
  if "prefix" in row:
    assert not row["prefix"][asked + 1].any()
    assert (row["prefix"][segments == 0] == 0).all()


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_masked_rows_can_be_restored_and_keep_their_budget(unit):
  objective = Objective("masked", mask_unit=unit)
  vocab = vocabulary(objective)
  rng = np.random.default_rng(1)
  for seed in range(200):
    row = masking.join_segments(
      masking.frame_documents(draw_documents(rng, 62), SPECIAL, 64)
    )
    tokens, segments = row["tokens"], row["segment_ids"]
    shown, targets = masking.mask_tokens(
      tokens, segments, objective, vocab, generator(seed)
    )
    chosen = targets >= 0
    np.testing.assert_array_equal(np.where(chosen, targets, shown), tokens)
    assert (tokens[chosen] >= 10).all()  # no special token
    # Units by hand: a word ends before a special token, a word's first piece, or a row.
    unit_of, count = np.full(len(tokens), -1), 0
    for i in range(len(tokens)):
      if tokens[i] < 10:
        continue
      inside = i > 0 and tokens[i - 1] >= 10 and segments[i] == segments[i - 1]
      count += not (unit != "token" and inside and CONTINUES[tokens[i]])
      unit_of[i] = count - 1
    picked = [set(chosen[unit_of == u]) for u in range(count)]
    assert all(len(states) == 1 for states in picked)  # whole, or not at all
    number = sum(True in states for states in picked)
    assert number in (int(0.15 * count), int(0.15 * count) + 1)
    if unit == "span":  # spans are contiguous: about a third as many runs as words
      runs = np.diff([False, *(True in states for states in picked)], prepend=0)
      assert (runs == 1).sum() <= max(1, number / 3 + 1)


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_masked_rates_are_those_of_the_config(unit):
  objective = Objective("masked", 0.2, unit, 3.0, 0.7, 0.2)
  vocab = vocabulary(objective)
  rng = np.random.default_rng(2)
  seen, drawn = [], []
  for seed in range(1500):
    tokens = rng.integers(10, TEXT, 100).astype(np.int32)
    segments = (np.arange(100) < 90).astype(np.int32)
    shown, targets = masking.mask_tokens(
      tokens, segments, objective, vocab, generator(seed)
    )
    chosen = targets >= 0
    assert not chosen[90:].any()
    other = chosen & (shown != tokens) & (shown != MASK)
    seen.append([chosen, chosen & (shown == MASK), other])
    drawn.append(shown[other])
  chosen, masked, other = np.mean(np.array(seen)[:, :, :90], axis=(0, 2))
  assert chosen == pytest.approx(0.2, abs=0.004)
  assert masked / chosen == pytest.approx(0.7, abs=0.02)
  # By chance, one random token in 140 is the right one.
  assert other / chosen == pytest.approx(0.2 * 139 / 140, abs=0.02)
  by_position = np.mean(np.array(seen)[:, 0, 5:85], axis=0)
  assert np.abs(by_position - 0.2).max() < 0.06  # five standard deviations
  counts = np.bincount(np.concatenate(drawn), minlength=V)
  assert not counts[:10].any() and not counts[TEXT:].any()
  assert counts[10:TEXT].min() > 0


def test_a_span_draws_one_lot_for_all_of_its_tokens():
  objective = Objective("masked", 0.3, "span", 4.0, 0.5, 0.0)
  vocab = vocabulary(objective, continues_word=None)
  tokens = np.arange(10, 140, dtype=np.int32)
  for seed in range(50):
    shown, targets = masking.mask_tokens(
      tokens, np.ones(130, np.int32), objective, vocab, generator(seed)
    )
    chosen = targets >= 0
    run = np.cumsum(np.diff(chosen, prepend=False))[chosen]
    for number in np.unique(run):
      assert len(set(shown[chosen][run == number] == MASK)) == 1


def test_words_end_with_their_document():
  goes_on = np.zeros(V, bool)
  goes_on[[11, 12]] = True
  tokens = np.array([10, 11, 12, 11, CLS, 12, 10])
  segments = np.array([1, 1, 1, 2, 2, 2, 2])
  begins = masking.word_begins(tokens, segments, tokens >= 10, goes_on)
  assert begins.tolist() == [True, False, False, True, False, True, True]


def test_documents_with_less_than_a_budget_keep_the_rate():
  objective = Objective("masked", 0.15, "word")
  vocab = vocabulary(objective)
  one_word = np.array([10, 10], np.int32)
  ones = np.ones(2, np.int32)
  chosen = [
    masking.mask_tokens(one_word, ones, objective, vocab, generator(i))[1][0] >= 0
    for i in range(4000)
  ]
  assert np.mean(chosen) == pytest.approx(0.15, abs=0.02)
  empty = np.zeros(0, np.int32)
  assert len(masking.mask_tokens(empty, empty, objective, vocab, generator())[0]) == 0


def test_masks_of_spans_are_all_equally_likely():
  for length, noise, num_spans in [(6, 3, 2), (5, 1, 1), (5, 5, 1), (7, 4, 4)]:
    found = {}
    random = generator(3)
    for _ in range(3000):
      mask = tuple(spans.random_spans(length, noise, num_spans, random).tolist())
      found[mask] = found.get(mask, 0) + 1
    possible = [
      mask
      for mask in itertools.product([False, True], repeat=length)
      if sum(mask) == noise
      and sum(b and not a for a, b in itertools.pairwise((False, *mask))) == num_spans
    ]
    assert sorted(found) == sorted(possible)
    expected = 3000 / len(possible)
    assert all(abs(n - expected) < 5 * expected**0.5 for n in found.values())


def test_frames_stand_in_place_of_bos_and_eos():
  def framed(documents, special=SPECIAL, seq_len=64):
    arrays = [np.array(document, np.int32) for document in documents]
    return [
      list(map(int, d)) for d in masking.frame_documents(arrays, special, seq_len)
    ]

  assert framed([[20, EOS], [BOS, 21, EOS], [BOS, 22]]) == [
    [CLS, 20, SEP],
    [CLS, 21, SEP],
    [CLS, 22, SEP],
  ]
  assert framed([[20], [21]], seq_len=5) == [[CLS, 20, SEP], [21]]
  no_bos = SPECIAL._replace(bos=-1)
  assert framed([[20, EOS], [21, EOS]], no_bos) == [[CLS, 20, SEP], [CLS, 21, SEP]]
  same = SPECIAL._replace(bos=CLS, eos=SEP)
  assert framed([[CLS, 20, SEP], [CLS]], same) == [[CLS, 20, SEP], [CLS, SEP]]


def test_joined_segments_count_from_their_beginning():
  row = masking.join_segments([np.array([5, 6, 7]), np.array([8]), np.array([9, 9])])
  assert row["tokens"].tolist() == [5, 6, 7, 8, 9, 9]
  assert row["segment_ids"].tolist() == [1, 1, 1, 2, 3, 3]
  assert row["positions"].tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("pairs", ["nsp", "sop"])
def test_pairs_are_cut_exchanged_and_labelled(pairs):
  objective = Objective("masked", pairs=pairs)
  vocab = vocabulary(objective)
  text, other = np.arange(10, 60, dtype=np.int32), np.arange(60, 90, dtype=np.int32)
  labels, starts = [], set()
  for seed in range(600):
    random = generator(seed)
    row = masking.make_pair_row(objective, vocab, text, lambda: other, random)
    tokens = np.where(row["targets"] >= 0, row["targets"], row["tokens"]).tolist()
    first, last = (i for i, token in enumerate(tokens) if token == SEP)
    a, b = tokens[1:first], tokens[first + 1 : last]
    assert tokens[0] == CLS and last == len(tokens) - 1 and a and b
    assert row["token_types"].tolist() == [0] * (first + 1) + [1] * (len(b) + 1)
    assert set(row["segment_ids"]) == {1}
    (label,) = row["pair_labels"].tolist()
    labels.append(label)
    if label == 0:
      assert a + b == text.tolist()
    elif pairs == "sop":
      assert b + a == text.tolist()
    else:
      assert a == text[: len(a)].tolist() and len(b) == min(50 - len(a), 30)
      starts.add(b[0])
      assert b == list(range(b[0], b[0] + len(b))) and b[0] >= 60 and b[-1] < 90
  assert np.mean(labels) == pytest.approx(0.5, abs=0.1)
  assert len(starts) > 10 or pairs == "sop"


def test_pairs_without_a_second_sentence_have_no_wrong_label():
  objective = Objective("masked", pairs="nsp")
  vocab = vocabulary(objective)
  text = np.array([10, 11, 12], np.int32)
  for seed in range(20):
    row = masking.make_pair_row(objective, vocab, text, lambda: None, generator(seed))
    assert row["pair_labels"].tolist() == [0]
    for size in (0, 1):
      row = masking.make_pair_row(
        objective, vocab, text[:size], lambda: text, generator(seed)
      )
      assert row["pair_labels"].tolist() == [-1] and len(row["tokens"]) == 3 + size


@pytest.mark.parametrize("rate,mean_span", [(0.15, 3.0), (0.5, 32.0), (0.9, 1.0)])
def test_corrupted_spans_can_be_filled_in_again(rate, mean_span):
  sentinels = vocabulary(Objective("span", num_sentinels=40)).sentinels
  rng = np.random.default_rng(4)
  hidden = total = num_spans = 0
  for seed in range(300):
    tokens = rng.integers(10, TEXT, int(rng.integers(1, 120))).astype(np.int32)
    if seed % 3 == 0 and len(tokens) > 9:
      tokens[7] = 9  # a control symbol within the text
    is_text = tokens >= 10
    room = int(rng.integers(0, 100))
    segment = spans.corrupt_spans(
      tokens, is_text, sentinels, rate, mean_span, room, generator(seed)
    )
    assert fill_in(segment) == tokens.tolist()
    assert len(segment.tokens) <= len(tokens) + room
    assert_nothing_leaks(
      {**segment._asdict(), "segment_ids": np.ones_like(segment.tokens)}
    )
    asked = segment.tokens[segment.prefix == 0]
    np.testing.assert_array_equal(segment.targets[segment.targets >= 0], asked)
    assert 9 not in asked
    if len(tokens) < 2 or room < 3:
      assert (segment.prefix == 1).all() and (segment.targets == -1).all()
    elif len(tokens) > 60 and room > 50:
      hidden += (asked < TEXT).sum()
      num_spans += (asked >= TEXT).sum() - 1
      total += len(tokens)
  assert hidden / total == pytest.approx(rate, abs=0.02)
  if mean_span > 1:  # at 0.9, gaps between spans leave no room for so many
    assert hidden / num_spans == pytest.approx(mean_span, rel=0.3)


def test_prefixes_are_given_and_the_rest_is_predicted():
  tokens, sizes = np.arange(20, 40, dtype=np.int32), []
  for seed in range(400):
    segment = spans.split_prefix(tokens, 77, generator(seed))
    np.testing.assert_array_equal(segment.tokens, tokens)
    size = int(segment.prefix.sum())
    sizes.append(size)
    assert segment.prefix.tolist() == [1] * size + [0] * (20 - size)
    wanted = [-1] * (size - 1) + tokens[size:].tolist() + [77]
    assert segment.targets.tolist() == wanted
  assert set(sizes) == set(range(1, 20))
  alone = spans.split_prefix(tokens[:1], -1, generator())
  assert alone.prefix.tolist() == [1] and alone.targets.tolist() == [-1]


@pytest.mark.parametrize("suffix_first", [False, True])
def test_middles_can_be_put_back(suffix_first):
  rng = np.random.default_rng(5)
  for seed in range(300):
    text = rng.integers(10, TEXT, int(rng.integers(2, 40)))
    head, tail = [BOS] * (seed % 2), [EOS] * (seed // 2 % 2)
    tokens = np.concatenate([head, text, tail]).astype(np.int32)
    segment = spans.fill_in_middle(
      tokens, tokens >= 10, PRE, MID, SUF, suffix_first, generator(seed)
    )
    assert put_back(segment.tokens) == tokens.tolist()
    assert segment.tokens[: len(head) + 1].tolist() == [*head, PRE]
    assert (segment.tokens[len(head) + 1] == SUF) or not suffix_first
    assert len(segment.tokens) == len(tokens) + 3
    assert segment.targets.tolist() == [*segment.tokens[1:].tolist(), -1]
    assert not segment.prefix.any()


def test_fim_and_spm_rates_are_those_of_the_config():
  objective = Objective("fim", fim_rate=0.6, spm_rate=0.25)
  vocab = vocabulary(objective)
  text = np.arange(10, 100, dtype=np.int32)
  rows = [
    masking.make_row(objective, vocab, 93, [text], 7, generator(seed))
    for seed in range(1500)
  ]
  moved = [row for row in rows if PRE in row["tokens"]]
  assert len(moved) / 1500 == pytest.approx(0.6, abs=0.05)
  # PSM may have an empty prefix too, about twice in 91 documents.
  spm = np.mean([row["tokens"][1] == SUF for row in moved])
  assert spm == pytest.approx(0.25 + 0.75 * 2 / 91, abs=0.05)
  # An unchanged document continues in the next row; a rearranged one does not.
  assert {int(row["targets"][-1]) for row in moved} == {-1}
  assert {int(r["targets"][-1]) for r in rows if PRE not in r["tokens"]} == {7}


@pytest.mark.parametrize("kind", ["masked", "span", "prefix", "fim"])
@pytest.mark.parametrize("seq_len", [12, 100])
def test_rows_of_many_documents_fit_and_lose_nothing(kind, seq_len):
  objective = Objective(kind, num_sentinels=40)
  vocab = vocabulary(objective)
  rng = np.random.default_rng(6)
  size = masking.stride(objective, vocab, seq_len, 28.0)
  asked = 0
  for seed in range(150):
    documents = draw_documents(rng, size)
    row = masking.make_row(objective, vocab, seq_len, documents, -1, generator(seed))
    if kind != "masked":
      assert_nothing_leaks(row)
    asked += (row["targets"] >= 0).sum()
    assert {name: array.dtype for name, array in row.items()} == dict.fromkeys(
      row, np.dtype(np.int32)
    )
    assert len(row["tokens"]) <= seq_len
    assert row["segment_ids"].max() == len(documents)
    for number, document in enumerate(documents, 1):
      inside = row["segment_ids"] == number
      tokens, targets = row["tokens"][inside], row["targets"][inside]
      np.testing.assert_array_equal(row["positions"][inside], np.arange(inside.sum()))
      if kind == "masked":
        restored = np.where(targets >= 0, targets, tokens)
        wanted = document[document >= 10].tolist()
        assert restored.tolist() == [CLS, *wanted, SEP]
      elif kind == "span":
        segment = spans.Segment(tokens, targets, row["prefix"][inside])
        assert fill_in(segment) == document.tolist()
      else:
        assert put_back(tokens) == document.tolist()
  assert asked > 0.1 * 150 * size


def test_the_room_for_symbols_is_used():
  # Documents are as long as a row, so the number of added tokens is known within 2.
  for kind, least in [("masked", 510), ("prefix", 512), ("span", 458), ("fim", 503)]:
    objective = Objective(kind, num_sentinels=40)
    size = masking.stride(objective, vocabulary(objective), 512, 10_000.0)
    assert least <= size <= least + 6, kind
  objective = Objective("masked", pairs="sop")
  assert masking.stride(objective, vocabulary(objective), 512, 5.0) == 509
  # Without bos, each document needs one more token.
  objective = Objective("masked")
  vocab = vocabulary(objective, special=SPECIAL._replace(bos=-1))
  assert masking.stride(objective, vocab, 512, 9.0) == pytest.approx(459, abs=2)
  with pytest.raises(ConfigError, match="room for text beside the symbols"):
    masking.stride(Objective("span"), vocabulary(Objective()), 5, 10.0)


def test_sentinels_lie_above_the_text():
  vocab = vocabulary(Objective("span", num_sentinels=50))
  assert vocab.sentinels.tolist() == list(range(199, 149, -1))
  assert not vocab.is_text[vocab.sentinels].any()
  with pytest.raises(ConfigError, match="at least 201: 150 of the tokenizer") as error:
    vocabulary(Objective("span", num_sentinels=51))
  assert error.value.key == "config.model.vocab_size"
  assert "256" in str(error.value)


@pytest.mark.parametrize(
  "objective,changes,message",
  [
    (Objective("masked"), {"special": SPECIAL._replace(mask=-1)}, "has no <mask>"),
    (Objective("masked"), {"special": SPECIAL._replace(sep=-1)}, "has no <sep>"),
    (Objective("fim"), {"special": SPECIAL._replace(fim_suffix=-1)}, "fim_suffix"),
    (Objective("masked", mask_unit="word"), {"continues_word": None}, "words begin"),
    (Objective("masked"), {"text_size": 9}, "room for ids of text"),
  ],
)
def test_ids_that_an_objective_lacks_are_named(objective, changes, message):
  with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
    vocabulary(objective, **changes)


def test_stacked_rows_are_padded():
  objective = Objective("masked", pairs="sop")
  row = masking.join_segments([np.array([5, 6])])
  row |= {"targets": np.array([-1, 3]), "token_types": np.array([0, 1])}
  row["pair_labels"] = np.array([1])
  batch = masking.stack([row, {}], objective, 3, 4)
  assert batch["tokens"].tolist() == [[5, 6, 4], [4, 4, 4]]
  assert batch["targets"].tolist() == [[-1, 3, -1], [-1, -1, -1]]
  assert batch["segment_ids"].tolist() == [[1, 1, 0], [0, 0, 0]]
  assert batch["pair_labels"].tolist() == [[1], [-1]]
  assert all(array.dtype == np.int32 for array in batch.values())
