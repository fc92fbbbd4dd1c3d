"""Texts become requests: where context and continuation meet, and masked words."""

import pytest

from flaxlm.errors import DataError
from flaxlm.evals.requests import (
  MaskedWords,
  ScoreRequest,
  empty_context,
  encode_after,
  encode_pairs,
  with_prefix,
)
from flaxlm.tokenizer.files import load_tokenizer


def test_a_continuation_begins_where_its_context_ends(bpe):
  pairs = [("import", " os"), ("import ", "os"), ("", "return None"), ("def f", "(x):")]
  requests, merged = encode_pairs(bpe, pairs)
  assert merged == 0
  assert requests[0] == requests[1]  # the space belongs to the continuation
  assert requests[2].context == []
  for (context, rest), request in zip(pairs, requests, strict=True):
    assert bpe.decode(request.context + request.continuation) == context + rest
    assert request.context == bpe.encode(context.rstrip())


def test_a_token_that_spans_the_join_is_counted_and_no_letter_is_lost(bpe):
  # " self" is one token: every cut inside it is spanned by a token.
  pairs = [("(self, sel", "f"), ("(self, s", "elf"), ("(self,", " self")]
  requests, merged = encode_pairs(bpe, pairs)
  assert merged == 2
  for (context, rest), request in zip(pairs, requests, strict=True):
    assert bpe.decode(request.continuation) == rest
    assert bpe.decode(request.context) == context


def test_nothing_to_score_is_an_error(bpe):
  with pytest.raises(DataError, match=r"continuation is empty[^$]*after 'import'"):
    encode_pairs(bpe, [("import", "")])


def test_every_text_begins_as_in_training(bpe):
  request = ScoreRequest([5], [6])
  assert with_prefix(bpe, request).context == [bpe.bos_id, 5]
  assert with_prefix(bpe, ScoreRequest([], [6])).context == [bpe.bos_id]


@pytest.fixture
def bare():
  """A tokenizer without bos: eos, or nothing, comes before a text."""

  class Bare:
    bos_id, eos_id, begin_ids = -1, 7, ()

  return Bare()


def test_without_bos_a_text_follows_the_end_of_another(bare):
  assert with_prefix(bare, ScoreRequest([5], [6])).context == [5]
  assert with_prefix(bare, ScoreRequest([], [6])).context == [7]
  bare.bos_id = 5  # a token that texts do not begin with, as GPT-2's
  assert with_prefix(bare, ScoreRequest([9], [6])).context == [9]
  assert with_prefix(bare, ScoreRequest([], [6])).context == [5]
  bare.bos_id = bare.eos_id = -1
  with pytest.raises(DataError, match="no bos, no eos"):
    empty_context(bare)


@pytest.mark.parametrize("name", ["mistral-v1_32k", "bpe_32k_c4", "t5-base_spiece"])
def test_a_dummy_space_is_not_part_of_a_continuation(corpora, name):
  tokenizer = load_tokenizer(corpora / f"from_repos/tokenizers/{name}.model")
  assert tokenizer.adds_prefix
  for rest in ("wer is here", " were", ". No", "ber\nx"):
    text = tokenizer.decode(tokenizer.encode("An") + encode_after(tokenizer, rest))
    assert text.split() == ("An" + rest).split()
  # Chinese has no spaces to cut at; runs of unknown characters become one token.
  chinese = [("中文的上下", "文在这里"), ("没有空", "格")]
  requests, _ = encode_pairs(tokenizer, chinese)
  assert all(request.continuation for request in requests)


class Words:
  """A WordPiece vocabulary: ids from 10 on continue words."""

  mask_id, cls_id, sep_id, bos_id, eos_id, unk_id = 1, 2, 3, -1, -1, -1
  begin_ids = ()
  vocab_size, splits_words = 20, True

  def pieces(self):
    return [b" a"] * 10 + [b"a"] * 10


def test_a_masked_model_sees_neither_a_token_nor_the_rest_of_its_word():
  words = MaskedWords(Words())
  segments = words.segments(ScoreRequest([5, 6], [7, 11, 12, 8]), 16)
  rows = [segment.tokens.tolist() for segment in segments]
  assert rows == [
    [2, 5, 6, 1, 1, 1, 8, 3],  # 7 with 11 and 12, which continue its word
    [2, 5, 6, 7, 1, 1, 8, 3],
    [2, 5, 6, 7, 11, 1, 8, 3],
    [2, 5, 6, 7, 11, 12, 1, 3],
  ]
  assert [segment.places.tolist() for segment in segments] == [[3], [4], [5], [6]]
  assert [segment.targets.tolist() for segment in segments] == [[7], [11], [12], [8]]
  cut = words.segments(ScoreRequest([5, 6], [7, 11, 12, 8]), 7)[0]
  assert cut.tokens.tolist() == [2, 6, 1, 1, 1, 8, 3] and cut.places.tolist() == [2]
  with pytest.raises(DataError, match="4 tokens"):
    words.segments(ScoreRequest([5, 6], [7, 11, 12, 8]), 5)
