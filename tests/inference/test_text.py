"""Texts are streamed in whole characters and end at the end-of-text token."""

import jax
import numpy as np
import pytest
from flax import nnx

from flaxlm.errors import ConfigError
from flaxlm.inference.decoding import for_decoding, generate
from flaxlm.inference.sampling import Sampling
from flaxlm.inference.text import TextStream, Writing, text_ids, tokenize_prompt
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer


@pytest.fixture
def model(tiny, bpe):
  tiny.model.vocab_size = bpe.vocab_size + 24  # rows to spare
  return for_decoding(Transformer(TransformerConfig(**tiny.model), nnx.Rngs(3)))


def test_a_prompt_begins_with_bos_and_is_not_empty(bpe, monkeypatch):
  assert tokenize_prompt(bpe, "") == [bpe.bos_id]
  assert tokenize_prompt(bpe, "def x") == [bpe.bos_id, *bpe.encode("def x")]
  monkeypatch.setattr(bpe, "bos_id", -1)
  assert tokenize_prompt(bpe, "def x") == bpe.encode("def x")
  with pytest.raises(ConfigError, match="no bos token"):
    tokenize_prompt(bpe, "")


def test_only_text_and_its_end_may_be_drawn(bpe):
  allowed = text_ids(bpe, bpe.vocab_size + 24)
  assert len(allowed) == bpe.vocab_size + 24 and not allowed[bpe.vocab_size :].any()
  assert allowed[bpe.eos_id] and allowed[bpe.encode("a")].all()
  assert not allowed[[bpe.bos_id, bpe.pad_id, bpe.unk_id]].any()


def test_a_stream_keeps_half_characters_and_ends_at_eos(bpe):
  stream, text = TextStream(bpe), "ab \U0001f9ea c"
  ids = bpe.encode(text)
  parts = [stream([i]) for i in ids]
  assert "".join(parts) == text and "\ufffd" not in text
  assert not stream.is_done
  assert stream([*bpe.encode("d"), bpe.eos_id, *bpe.encode("e")]) == "d"
  assert stream.is_done and stream(bpe.encode("f")) == ""
  assert stream([], final=True) == ""
  half = TextStream(bpe)
  assert half(bpe.encode("\U0001f9ea")[:-1]) == ""
  assert half([], final=True) == "\ufffd"


def test_a_continuation_keeps_the_space_that_tokenizers_put_before_texts(
  bpe, monkeypatch
):
  ids = bpe.encode(" return value")
  assert TextStream(bpe, begins=True)(ids) == " return value"
  monkeypatch.setattr(bpe, "adds_prefix", True)  # as those of Llama 2 and Mistral do
  assert TextStream(bpe, begins=True)(ids) == "return value"
  assert TextStream(bpe)(ids) == " return value"


def test_a_stream_ends_at_a_stop_string_that_tokens_split(bpe):
  ids = bpe.encode("one two\n\nthree four")
  for stop, expected in (
    (("\n\n",), "one two"),
    (("four", "o\n\nth"), "one tw"),
    (("wo", "two"), "one "),
    (("never", "fourth"), "one two\n\nthree four"),
  ):
    for size in (1, 3, len(ids)):
      stream, found = TextStream(bpe, stop=stop), ""
      for first in range(0, len(ids), size):
        found += stream(ids[first : first + size])
        assert expected.startswith(found)  # nothing is shown that is taken back
      found += stream([], final=True)
      assert found == expected
      assert stream.finish == ("" if "never" in stop else "stop")
  with pytest.raises(ConfigError, match="stop"):
    TextStream(bpe, stop=("",))


def test_a_stream_ends_at_every_end_token_and_where_the_context_is_full(bpe):
  for end, finish in ((bpe.eos_id, "end"), (bpe.sep_id, "end"), (-1, "context")):
    stream = TextStream(bpe, end_ids=(bpe.sep_id,), stop=("de",))
    assert stream([*bpe.encode("ab d"), end, *bpe.encode("e")]) == "ab d"
    assert stream.finish == finish and stream(bpe.encode("e"), final=True) == ""


def test_special_names_in_a_prompt_are_text_unless_asked(bpe):
  named = tokenize_prompt(bpe, "a<sep>b", specials=True)
  assert named == [bpe.bos_id, *bpe.encode("a"), bpe.sep_id, *bpe.encode("b")]
  assert bpe.sep_id not in tokenize_prompt(bpe, "a<sep>b")
  assert tokenize_prompt(bpe, "<bos>a", specials=True) == [bpe.bos_id, *bpe.encode("a")]


def test_written_texts_are_those_of_the_generated_ids(model, bpe):
  prompts = [tokenize_prompt(bpe, text) for text in ("def ", "", "class A:")]
  sampling = Sampling(seed=5)
  parts = list(Writing(model, bpe, prompts, 21, sampling))
  texts = ["".join(pieces) for pieces in zip(*parts, strict=True)]
  allowed = text_ids(bpe, model.config.vocab_size)
  ids = list(generate(model, prompts, 21, sampling, allowed))
  for text, row in zip(texts, np.concatenate(ids, axis=1).tolist(), strict=True):
    row = row[: row.index(bpe.eos_id)] if bpe.eos_id in row else row
    assert text == bpe.decode(row)


def test_writing_stops_when_every_text_has_ended(model, bpe):
  model = jax.tree.map(lambda x: 0 * x, model)  # all tokens are equally likely
  allowed = text_ids(bpe, model.config.vocab_size)
  assert bpe.eos_id == np.flatnonzero(allowed)[0]  # so greedy decoding ends at once
  parts = list(Writing(model, bpe, [[5], [6, 7]], 1000, Sampling(0.0)))
  assert parts == [["", ""], ["", ""]]
