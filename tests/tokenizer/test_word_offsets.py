"""Encoding word by word gives the ids of the whole text and each token's position."""

import random

import numpy as np
import pytest

from flaxlm.tokenizer import word_offsets


def word_piece():
  """A tokenizer.json like BERT's, with few pieces."""
  tokenizers = pytest.importorskip("tokenizers")
  from flaxlm.tokenizer.fast import FastTokenizer

  letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'()"
  names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
  pieces = [*names, "the", "##ing", "play", "中", "文", *letters]
  pieces += ["##" + letter for letter in letters]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  model = tokenizers.models.WordPiece(vocab, unk_token="[UNK]")
  backend = tokenizers.Tokenizer(model)
  backend.normalizer = tokenizers.normalizers.BertNormalizer()
  backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  backend.decoder = tokenizers.decoders.WordPiece()
  backend.add_special_tokens(names)
  return FastTokenizer(backend.to_str().encode())


def test_word_by_word_is_the_whole_text_for_word_piece():
  tok = word_piece()
  encoder = word_offsets.WordEncoder(tok)
  text = " Playing (U.S.) the é中文x 😀ab\n☃ it's ☃x.  "
  located = encoder.locate(text)
  assert located.ids.tolist() == tok.encode(text)
  shown = [text[a:b] for a, b in zip(located.starts, located.ends, strict=True)]
  assert shown == [
    *["Play", "ing", "(", "U", ".", "S", ".", ")", "the", "é", "中", "文", "x"],
    *["😀ab", "☃", "i", "t", "'", "s", "☃x", "."],
  ]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_word_by_word_is_the_whole_text_for_sentence_piece(kind, english):
  from flaxlm.tokenizer.sentencepiece import Tokenizer, sample_lines, train_tokenizer

  lines = sample_lines([english], 50_000)
  model = train_tokenizer(lines, kind, 400)
  tok = Tokenizer(model)
  encoder = word_offsets.WordEncoder(tok)
  rng = random.Random(0)
  pieces = tok.pieces()
  odd = ["  ", "\n", "\u3000", "é", "中文", "😀", "\u2581", "\t", "a" * 9]
  for _ in range(200):
    start = rng.randrange(len(english))
    parts = [english[start : start + 40], *rng.choices(odd, k=6)]
    rng.shuffle(parts)
    text = "".join(parts).rstrip()
    located = encoder.locate(text)
    assert tok.decode(located.ids) == text
    if kind != "unigram":  # which breaks ties differently in longer texts
      assert located.ids.tolist() == tok.encode(text)
    for token, a, b in zip(*located, strict=True):
      piece = pieces[token].decode(errors="replace")
      if "\ufffd" not in piece:
        assert text[a:b] == piece.strip()
    assert (np.diff(located.starts) >= 0).all()


@pytest.mark.parametrize("keeps_spaces", [True, False])
def test_a_tokenizer_that_adds_the_space_itself(keeps_spaces, english):
  import io

  import sentencepiece

  from flaxlm.tokenizer.sentencepiece import Tokenizer

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(english.split("\n")[:2000]),
    model_writer=model,
    vocab_size=400,
    model_type="bpe",
    byte_fallback=True,
    remove_extra_whitespaces=not keeps_spaces,
    minloglevel=2,
  )
  tok = Tokenizer(model.getvalue())
  encoder = word_offsets.WordEncoder(tok)
  assert tok.adds_prefix and encoder.space == " " * (not keeps_spaces)
  text = "the class of an argument"
  located = encoder.locate(text)
  assert located.ids.tolist() == tok.encode(text)
  assert [i for row in encoder.encode(text.split()) for i in row] == tok.encode(text)
  for token, a, b in zip(*located, strict=True):
    assert text[a:b] == tok.pieces()[token].decode().strip()


@pytest.mark.parametrize("form", ["model", "json"])
def test_a_dummy_prefix_is_put_before_the_first_word_alone(form, english):
  """Llama's tokenizer puts a space before a text, not before each of its lines."""
  import io

  import sentencepiece

  from flaxlm.tokenizer.export import to_tokenizer_json
  from flaxlm.tokenizer.files import open_tokenizer
  from flaxlm.tokenizer.sentencepiece import sample_lines

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sample_lines([english], 50_000)), model_writer=model,
    vocab_size=400, model_type="bpe", byte_fallback=True, minloglevel=2,
    normalization_rule_name="identity", remove_extra_whitespaces=False,
  )  # fmt: skip
  content = model.getvalue()
  tok = open_tokenizer(content if form == "model" else to_tokenizer_json(content))
  encoder = word_offsets.WordEncoder(tok)
  assert encoder.space == ""
  for text in [
    "it is",
    "\nit",
    " it",
    "it\nis\n\n\tas  a\nword",
    english[:1000].strip(),
  ]:
    located = encoder.locate(text)
    assert located.ids.tolist() == tok.encode(text)
    ends = [text[a:b] for a, b in zip(located.starts, located.ends, strict=True)]
    assert "".join(ends) == "".join(text.split())
