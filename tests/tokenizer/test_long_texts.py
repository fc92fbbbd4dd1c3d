"""Texts of any length get the ids that the library gives the whole text."""

import collections
import io
import itertools
import random

import numpy as np
import pytest
import sentencepiece

from flaxlm import errors
from flaxlm.data.store import units
from flaxlm.data.text.documents import TextPiece
from flaxlm.tokenizer import fast, long_texts, pieces
from flaxlm.tokenizer import sentencepiece as ours
from flaxlm.tokenizer.fast import FastTokenizer
from flaxlm.tokenizer.files import load_tokenizer
from flaxlm.tokenizer.sentencepiece import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
models, words = tokenizers.models, tokenizers.pre_tokenizers
normalizers = tokenizers.normalizers

LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture
def small_chunks(monkeypatch):
  """Long texts begin at 1,500 characters."""
  for module in (long_texts, ours, fast, pieces):
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 1500)
  for module in (long_texts, ours, fast):
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 4000, raising=module is not ours)
  monkeypatch.setattr(long_texts, "OVERLAP", 400)


@pytest.fixture(scope="module")
def lines(english) -> list[str]:
  return [line for line in english[:60_000].splitlines() if line]


@pytest.fixture(scope="module")
def texts(english) -> list[str]:
  """Prose, and what is hard to cut: runs, added tokens, no spaces, odd characters."""
  rng = random.Random(0)
  marks = (
    " |  |\n|\n\n|\u2581|<tool>| <tool> |zq|\u00e9|e\u0301|\ufb01|\U0001f600|\t|中文"
  )
  marks = [*marks.split("|"), "123456789", "aaaa", "the ", "self."]
  odd = "".join(rng.choice(marks) * rng.randrange(1, 4) for _ in range(1200))
  runs = "x" * 3000 + " " * 3000 + "zq" * 1500 + "7" * 3000 + "<tool>" * 500
  return [english[:12_000], odd, english[:2000] + runs + odd[:2000], "\u4e2d" * 2500]


def assert_exact(tokenizer, whole, texts) -> None:
  for text in texts:
    expected = whole(text)
    assert tokenizer.encode(text) == expected
    parts = (text[i : i + 700] for i in range(0, len(text), 700))
    found = list(tokenizer.encode_long(parts, 2))
    assert np.concatenate(found).tolist() == expected
    assert {row.dtype for row in found} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
  "options",
  [
    {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    {"normalization_rule_name": "identity", "byte_fallback": True},
    {"add_dummy_prefix": False},
    {"user_defined_symbols": ["zq", "aa", "<tool>"]},
    {"treat_whitespace_as_suffix": True, "normalization_rule_name": "identity"},
    {"model_type": "char", "normalization_rule_name": "identity"},
    {"model_type": "unigram", "vocab_size": 200},
    {"model_type": "word", "hard_vocab_limit": False},
  ],
  ids=lambda options: "-".join(f"{value}" for value in options.values()),
)
def test_sentencepiece(options, lines, texts, small_chunks):
  model = io.BytesIO()
  defaults = {"model_type": "bpe", "vocab_size": 500}
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=model, minloglevel=2,
    **(defaults | options),
  )  # fmt: skip
  tokenizer = Tokenizer(model.getvalue())
  library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
  if not options.get("add_dummy_prefix", True):
    texts = [text.replace("\u2581", "") for text in texts]
  assert_exact(tokenizer, library.encode, texts)
  is_cut = options.get("normalization_rule_name") == "identity"
  is_cut &= not options.get("treat_whitespace_as_suffix")
  assert (len(list(tokenizer.encode_long(iter(texts[:1] * 4)))) > 1) == is_cut


KINDS = {
  "gpt2": (None, words.ByteLevel(add_prefix_space=False)),
  "prefix": (normalizers.NFC(), words.ByteLevel(add_prefix_space=True)),
  "llama3": (
    normalizers.NFC(),
    words.Sequence(
      [
        words.Split(tokenizers.Regex(LLAMA_3), "isolated"),
        words.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    ),
  ),
  "prepend": (
    normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    None,
  ),
  "first": (None, words.Metaspace(prepend_scheme="first", split=False)),
  "always": (normalizers.NFKC(), words.Metaspace(prepend_scheme="always")),
  "strip": (
    normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()]),
    words.Metaspace(),
  ),
  "length": (None, words.FixedLength(length=7)),
  "unigram": (None, words.Metaspace(prepend_scheme="always")),
  "unigram whole": (None, words.Metaspace(prepend_scheme="first", split=False)),
  "wordpiece": (normalizers.BertNormalizer(), words.BertPreTokenizer()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizers_library(kind, lines, texts, small_chunks):
  trainers, decoders = tokenizers.trainers, tokenizers.decoders
  alphabet = words.ByteLevel.alphabet() if kind in ("gpt2", "prefix", "llama3") else []
  common = {"vocab_size": 500, "special_tokens": ["<unk>"], "show_progress": False}
  if kind.startswith("unigram"):
    made = tokenizers.Tokenizer(models.Unigram())
    trainer, decoder = (
      trainers.UnigramTrainer(**common | {"vocab_size": 200}, unk_token="<unk>"),
      decoders.Metaspace(),
    )
  elif kind == "wordpiece":
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    trainer, decoder = trainers.WordPieceTrainer(**common), decoders.WordPiece()
  else:
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(**common, initial_alphabet=alphabet)
    decoder = decoders.ByteLevel() if alphabet else decoders.Metaspace()
  made.pre_tokenizer = words.WhitespaceSplit()  # quick to train, and the same pieces
  if alphabet or kind == "wordpiece":
    made.pre_tokenizer = KINDS[kind][1]
  made.train_from_iterator(lines[:300], trainer)
  made.normalizer, made.pre_tokenizer = KINDS[kind]
  made.decoder = decoder
  made.add_tokens([tokenizers.AddedToken("<tool>", lstrip=True, rstrip=True), "zq"])
  tokenizer = FastTokenizer(made.to_str().encode())

  def whole(text):
    return made.encode(text, add_special_tokens=False).ids

  assert_exact(tokenizer, whole, [text.replace("<unk>", "") for text in texts])
  if kind == "length":  # were it cut all the same, neighbours would agree by chance
    assert not tokenizer._can_cut
    tokenizer._can_cut = True
    assert_exact(tokenizer, whole, texts[:2])
    return
  is_cut = kind != "unigram whole"
  assert (len(list(tokenizer.encode_long(iter(texts[:1] * 4)))) > 1) == is_cut


@pytest.mark.slow
def test_published_model_on_a_real_text(corpora):
  """The number of ids of tiny Shakespeare is that of SentencePiece."""
  name = "from_repos/tokenizers/mistral-v1_32k.model"
  tokenizer = load_tokenizer(corpora / name)
  text = (corpora / "from_repos/corpora/tinyshakespeare.txt").read_text("utf-8")
  ids = tokenizer.encode(text)
  assert len(ids) == 361_972
  library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
  assert ids[:60_000] == library.encode(text[:200_000])[:60_000]
  assert tokenizer.decode(ids) == text


class Quiet:
  def update(self, file, num_bytes, num_tokens):
    self.bytes = getattr(self, "bytes", 0) + num_bytes


def stream(tokenizer, documents: list[str], checks) -> list[tuple[str, list[int]]]:
  """Returns (text, ids) of each document that passes through `encode_stream`."""
  found = []
  parts = [list(pieces.cut(text, 500)) for text in documents]
  given = [
    TextPiece(part, i == len(cut) - 1, (0, n + (i == len(cut) - 1)), "", ())
    for n, cut in enumerate(parts)
    for i, part in enumerate(cut)
  ]
  text, ids, progress = "", [], Quiet()
  for piece, row in units.encode_stream(given, tokenizer, progress, checks):
    text, ids = text + piece.text, ids + row.tolist()
    if piece.end:
      found.append((text, ids))
      text, ids = "", []
  assert not ids and progress.bytes == sum(len(t.encode()) for t in documents)
  return found


def test_documents_of_a_store_are_encoded_whole(
  lines, texts, bpe, small_chunks, monkeypatch
):
  """Documents in many pieces have the ids of the whole, and are compared whole."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=model, minloglevel=2, vocab_size=500,
    model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
    remove_extra_whitespaces=False,
  )  # fmt: skip
  tokenizer = Tokenizer(model.getvalue())
  library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
  prose = texts[0]
  documents = ["d\u2581e", prose[:9000], "", "b c", prose[9000:], prose[:100]]
  monkeypatch.setattr(units, "ENCODED_TOGETHER", 3000)
  checks = collections.Counter()
  found = stream(tokenizer, documents, checks)
  assert [text for text, _ in found] == documents
  assert [ids for _, ids in found] == [library.encode(text) for text in documents]
  assert checks["checked"] >= 4 and checks["changed"] == 1  # U+2581 became a space
  # A change at a cut is seen: here each cut loses a token.
  assert bpe.is_lossless
  encode_long = bpe.encode_long
  monkeypatch.setattr(
    bpe,
    "encode_long",
    lambda *args: (row[1:] if i else row for i, row in enumerate(encode_long(*args))),
  )
  with pytest.raises(errors.DataError, match="the tokenizer changes a text"):
    stream(bpe, [prose], collections.Counter())


def test_pieces_that_are_not_used_forbid_cuts(bpe):
  """SentencePiece splits such a piece as it was made, perhaps elsewhere in the text."""
  proto = bpe._proto()
  assert long_texts.SafeCuts(proto).possible
  proto.pieces[-1].type = 5
  assert not long_texts.SafeCuts(proto).possible


def test_cuts_are_where_no_piece_lies(bpe):
  cuts = bpe._cuts
  spelt = [piece.decode() for piece in bpe.pieces() if piece and piece[0] < 0x80]
  inside = {"".join(pair) for piece in spelt for pair in itertools.pairwise(piece)}
  assert inside and not any(cuts.is_safe(pair, 1) for pair in inside)
  assert cuts.is_safe("a b", 1) and not cuts.is_safe("a\u0001", 1)  # unknown: bytes
