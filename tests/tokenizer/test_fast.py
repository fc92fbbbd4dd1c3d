"""Hugging Face tokenizers: same ids as the originals, nothing forged or lost."""

import json
import pathlib
import random
import shutil
import sys

import numpy as np
import pytest
import sentencepiece

from flaxlm import errors
from flaxlm.data.store import build, manifest, shards
from flaxlm.tokenizer.export import export_files, to_tokenizer_json
from flaxlm.tokenizer.fast import FastTokenizer
from flaxlm.tokenizer.files import (
  QWEN_WORDS,
  file_name,
  find_tokenizer,
  load_tokenizer,
  open_tokenizer,
)
from flaxlm.tokenizer.pieces import SPACE_MARK, Decoder, continues_word
from flaxlm.tokenizer.sentencepiece import Tokenizer, sample_lines, train_tokenizer

tokenizers = pytest.importorskip("tokenizers")

ODD = [
  "",
  "\n",
  " ",
  "   leading and trailing   ",
  "tabs\tand\r\nnewlines\n\n\n",
  "\u2581",
  "a\u2581\u2581 b \u2581",
  "NUL \0 inside",
  "\ufeffbyte order mark",
  "家族 👨‍👩‍👧‍👦 e\u0301 \u202eright to left",
  "مرحبا بالعالم  كيف",
  "\u2585\u2047\uffff\U0010ffff\ue000 \ufb01 \u2460 A\u030a\u3000\uff76",
  "<mask><pad></s><0x0A><unk> [MASK] [UNK]<|endoftext|>",
  "I'VE don't  we'll 1234567890" * 3,
  "漢字" * 200,
  "x" * 300,
]


def random_texts(count: int) -> list[str]:
  rng = random.Random(0)
  pools = [
    lambda: chr(rng.randrange(0x80)),
    lambda: chr(rng.randrange(0x800)),
    lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
    lambda: rng.choice(" \n\t\r\0\u2581\u3000\u00a0\u200b\ufeff") * rng.randrange(1, 9),
    lambda: rng.choice(["the ", "self.", "[MASK]", "中文", "<|endoftext|>", "</s>"]),
  ]
  return [
    "".join(rng.choice(pools)() for _ in range(rng.randrange(60))) for _ in range(count)
  ]


TEXTS = ODD + random_texts(200)


@pytest.fixture(scope="module")
def wordpiece(english, tmp_path_factory) -> pathlib.Path:
  """A directory with the vocab.txt of a small lower-case WordPiece model."""
  made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
  made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
  made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  trainer = tokenizers.trainers.WordPieceTrainer(
    vocab_size=1000, special_tokens=special, show_progress=False
  )
  made.train_from_iterator(english[:100_000].splitlines(), trainer)
  folder = tmp_path_factory.mktemp("wordpiece")
  made.model.save(str(folder))
  return folder


@pytest.fixture(scope="module")
def byte_bpe(english, tmp_path_factory) -> pathlib.Path:
  """A directory with the vocab.json and merges.txt of a small byte-level model."""
  library = tokenizers.pre_tokenizers.ByteLevel
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = library(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=1000,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=library.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(english[:100_000].splitlines(keepends=True), trainer)
  folder = tmp_path_factory.mktemp("byte_bpe")
  made.model.save(str(folder))
  return folder


def copy(source: pathlib.Path, target: pathlib.Path, **files: dict) -> pathlib.Path:
  """Copies a directory and writes some JSON files into it."""
  shutil.copytree(source, target)
  for name, tree in files.items():
    (target / f"{name}.json").write_text(json.dumps(tree))
  return target


def assert_same_ids(ours: FastTokenizer, theirs) -> None:
  """Ours equals a transformers tokenizer, in text and in templates."""
  theirs.model_max_length = 10**9
  for text in TEXTS:
    plain = theirs(text, add_special_tokens=False, split_special_tokens=True)
    assert ours.encode(text) == plain["input_ids"], text
    whole = theirs(text, add_special_tokens=False)
    assert ours.encode(text, specials=True) == whole["input_ids"], text
  batch = ours.encode_batch(TEXTS, num_threads=2)
  assert [ids.tolist() for ids in batch] == [ours.encode(text) for text in TEXTS]
  assert {ids.dtype for ids in batch} == {np.dtype(np.int32)}


@pytest.mark.parametrize("lower", [None, True, False])
def test_wordpiece_is_that_of_bert(lower, wordpiece, tmp_path):
  transformers = pytest.importorskip("transformers")
  options = {} if lower is None else {"do_lower_case": lower}
  folder = copy(wordpiece, tmp_path / "x", tokenizer_config=options)
  ours = load_tokenizer(folder)
  vocab = str(folder / "vocab.txt")
  assert_same_ids(
    ours, transformers.BertTokenizer(vocab, do_lower_case=lower is None or lower)
  )
  assert [ours.pad_id, ours.unk_id, ours.cls_id, ours.sep_id, ours.mask_id] == [
    *range(5)
  ]
  assert (ours.bos_id, ours.eos_id) == (ours.cls_id, ours.sep_id)
  assert not ours.is_lossless and not ours.byte_fallback


@pytest.mark.parametrize("kind", ["GPT2", "Qwen2"])
def test_byte_level_bpe_is_that_of_gpt2_and_qwen(kind, byte_bpe, tmp_path):
  transformers = pytest.importorskip("transformers")
  config = {"tokenizer_class": f"{kind}Tokenizer", "eos_token": "<|endoftext|>"}
  folder = copy(byte_bpe, tmp_path / "x", tokenizer_config=config)
  made = {"GPT2": transformers.GPT2Tokenizer, "Qwen2": transformers.Qwen2Tokenizer}
  ours = load_tokenizer(folder / "merges.txt")
  assert_same_ids(ours, made[kind].from_pretrained(str(folder)))
  assert ours.is_lossless == (kind == "GPT2")  # Qwen normalises
  assert (ours.bos_id, ours.eos_id, ours.unk_id) == (-1, 0, -1)


@pytest.mark.parametrize("name", ["bert", "vocab.txt", "chinese", "gpt2"])
def test_published_tokenizers(name, corpora, tmp_path):
  transformers = pytest.importorskip("transformers")
  packages = corpora / "from_packages/tokenizers"
  bert, gpt2 = packages / "bert-base-uncased", packages / "gpt2"
  if name == "gpt2":
    (tmp_path / "vocab.json").write_bytes((gpt2 / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((gpt2 / "vocab.bpe").read_bytes())
    ours = load_tokenizer(gpt2)
    assert_same_ids(ours, transformers.GPT2Tokenizer.from_pretrained(str(tmp_path)))
    assert ours.is_lossless and ours.byte_fallback and ours.vocab_size == 50257
    assert ours.bos_id == ours.eos_id == 50256
  elif name == "bert":
    ours = load_tokenizer(bert)
    assert_same_ids(ours, transformers.AutoTokenizer.from_pretrained(str(bert)))
    assert (ours.cls_id, ours.sep_id, ours.mask_id) == (101, 102, 103)
    assert len(ours.encode("word " * 1000)) == 1000  # the file says: cut at 128
  else:
    file = corpora / "from_repos/tokenizers/bert-base-chinese_vocab.txt"
    file = bert / "vocab.txt" if name == "vocab.txt" else file
    assert_same_ids(load_tokenizer(file), transformers.BertTokenizer(str(file)))


def test_byte_level_text_survives(byte_bpe, english):
  tok = load_tokenizer(byte_bpe)
  assert tok.is_lossless and tok.loss == "" and tok.byte_fallback
  for text in [*TEXTS, english]:
    assert tok.decode(tok.encode(text)) == text
  decode = Decoder(tok)
  text = "naïve 漢字 😀\u2581 end\n"
  parts = [decode([i]) for i in tok.encode(text)] + [decode([], final=True)]
  assert "".join(parts) == text and "\ufffd" not in "".join(parts) and "" in parts
  assert tok.decode([0, *tok.encode("a b"), 0]) == "a b"


def test_gpt2_may_call_its_only_special_token_unknown(byte_bpe):
  tree = json.loads(load_tokenizer(byte_bpe).model)
  tree["model"]["unk_token"] = "<|endoftext|>"
  tok = FastTokenizer(json.dumps(tree).encode())
  assert tok.unk_id == -1 and tok.is_lossless and tok.decode([tok.eos_id]) == ""


def test_words_without_pieces():
  words = tokenizers.models.WordLevel({"A": 0, "C": 1, "[UNK]": 2}, unk_token="[UNK]")
  made = tokenizers.Tokenizer(words)
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tok = FastTokenizer(made.to_str().encode())
  assert tok.encode("C  A x") == [1, 0, 2] and tok.decode([1, 0]) == "C A"
  assert tok.unk_id == 2 and not continues_word(tok).any()


def test_wordpiece_text_is_words(wordpiece):
  tok = load_tokenizer(wordpiece)
  assert tok.decode(tok.encode("The  value, RETURNED")) == "the value , returned"
  assert tok.decode(tok.encode("a\u2603b")) == "\ufffd"


def library_models() -> dict:
  """A tokenizer of each kind whose vocabulary holds its special tokens."""
  models, words = tokenizers.models, tokenizers.pre_tokenizers.WhitespaceSplit()
  letters = [chr(code) for code in range(0x21, 0x7F)]
  vocab = {piece: i for i, piece in enumerate(["<s>", "</s>", "<unk>", *letters])}
  scores = [(piece, 0.0 if i < 3 else -5.0) for piece, i in vocab.items()]
  made = {
    "unigram": (models.Unigram(scores, unk_id=2), None),
    "bpe": (models.BPE(vocab, [], unk_token="<unk>", ignore_merges=True), None),
    "wordpiece": (
      models.WordPiece(
        vocab | {f"##{x}": 97 + i for i, x in enumerate(letters)}, unk_token="<unk>"
      ),
      words,
    ),
    "words": (models.WordLevel(vocab, unk_token="<unk>"), words),
  }
  for name, (model, pre_tokenizer) in made.items():
    made[name] = tokenizers.Tokenizer(model)
    if pre_tokenizer:
      made[name].pre_tokenizer = pre_tokenizer
    added = [
      tokenizers.AddedToken(token, normalized=False)
      for token in ("<s>", "</s>", "<unk>")
    ]
    made[name].add_special_tokens(added)
  return made


@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece", "words"])
def test_special_tokens_cannot_be_forged(kind):
  made = library_models()[kind]
  tok = FastTokenizer(made.to_str().encode())
  assert (tok.bos_id, tok.eos_id, tok.unk_id) == (0, 1, 2)
  for text in ("</s>", "a </s> b", "a</s><s>", "<s>"):
    assert not {0, 1} & set(tok.encode(text)), text
    ids = made.encode(text, add_special_tokens=False).ids
    assert tok.encode(text, specials=True) == ids
    assert {0, 1} & set(ids)
  if kind == "unigram":  # why the library's own switch is not used
    made.encode_special_tokens = True
    assert 1 in made.encode("a </s>").ids


def test_roles_come_from_the_files_beside(wordpiece, byte_bpe, tmp_path):
  def roles(source, name, **files):
    tok = load_tokenizer(copy(source, tmp_path / name, **files))
    return tok.bos_id, tok.eos_id, tok.pad_id, tok.cls_id, tok.sep_id, tok.mask_id

  assert roles(wordpiece, "a") == (2, 3, 0, 2, 3, 4)
  assert roles(byte_bpe, "b") == (0, 0, -1, -1, -1, -1)
  named = {"bos_token": None, "eos_token": {"content": "<|endoftext|>"}}
  assert roles(byte_bpe, "c", tokenizer_config=named) == (-1, 0, -1, -1, -1, -1)
  more = {"pad_token": "<p>", "eos_token": "<|endoftext|>"}
  added = {"1000": {"content": "<p>", "special": True}}
  files = {
    "special_tokens_map": more,
    "tokenizer_config": {"added_tokens_decoder": added},
  }
  assert roles(byte_bpe, "d", **files) == (-1, 0, 1000, -1, -1, -1)
  with pytest.raises(errors.DataError, match=r"not in the vocabulary\n.*<p>"):
    roles(byte_bpe, "e", special_tokens_map=more)


def test_one_file_says_it_all(wordpiece, tmp_path):
  config = {"do_lower_case": False, "mask_token": "[UNK]", "chat_template": "{{ 1 }}"}
  folder = copy(wordpiece, tmp_path / "x", tokenizer_config=config)
  tok = load_tokenizer(folder / "vocab.txt")
  kept = tmp_path / "kept"
  kept.mkdir()
  (kept / file_name(tok.model)).write_bytes(tok.model)
  assert find_tokenizer(kept).name == "tokenizer.json"
  for again in (open_tokenizer(tok.model), load_tokenizer(kept)):
    assert again.sha256 == tok.sha256 and again.mask_id == again.unk_id == 1
    assert again.encode("The") == tok.encode("The") != tok.encode("the")
    assert again.chat_template == "{{ 1 }}"
  assert load_tokenizer(wordpiece).sha256 != tok.sha256


def test_capitals_in_a_vocabulary_mean_that_they_matter(wordpiece, tmp_path):
  lines = (wordpiece / "vocab.txt").read_text().splitlines()
  capitals = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
  (tmp_path / "vocab.txt").write_text("\r\n".join([*lines, *capitals]))
  tok = load_tokenizer(tmp_path / "vocab.txt")
  assert tok.encode("A") == [len(lines)] != tok.encode("a")
  (tmp_path / "vocab.txt").write_text("\n".join([*lines, *capitals[1:]]))
  tok = load_tokenizer(tmp_path / "vocab.txt")
  assert tok.encode("B") == tok.encode("b")


def test_pieces_that_continue_a_word(wordpiece, byte_bpe, bpe):
  def shown(tok, text):
    goes_on, pieces = continues_word(tok), tok.pieces()
    words = []
    for i in tok.encode(text):
      piece = pieces[i]
      if words and goes_on[i]:
        words[-1] += piece
      else:
        words.append(piece)
    return [word.decode().strip() for word in words]

  for tok in map(load_tokenizer, (wordpiece, byte_bpe)):
    goes_on = continues_word(tok)
    assert goes_on.dtype == bool and len(goes_on) == tok.vocab_size
    assert not goes_on[list(tok.special_tokens.values())].any()
    assert shown(tok, "undeniably, a quixotic word") == [
      "undeniably", ",", "a", "quixotic", "word"
    ]  # fmt: skip
  assert shown(bpe, "undeniably (42) naïve") == ["undeniably", "(42", ")", "naïve"]
  assert shown(bpe, "x\n中文 да") == ["x", "", "中", "文", "да"]


def test_which_file_of_a_directory(bpe, byte_bpe, wordpiece, tmp_path):
  for name, content in export_files(bpe.model, 512).items():
    (tmp_path / name).write_bytes(content)
  assert load_tokenizer(tmp_path).sha256 == bpe.sha256  # what the JSON was made from
  tree = json.loads((tmp_path / "tokenizer.json").read_text())
  tree["added_tokens"].append(tree["added_tokens"][-1] | {"id": 1000, "content": "<x>"})
  (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
  assert load_tokenizer(tmp_path).vocab_size == 1001
  (tmp_path / "tokenizer.json").unlink()
  shutil.copy(byte_bpe / "vocab.json", tmp_path)
  assert load_tokenizer(tmp_path).sha256 == bpe.sha256
  (tmp_path / "tokenizer.model").unlink()
  with pytest.raises(errors.MissingInputError, match=r"merges\.txt"):
    load_tokenizer(tmp_path)
  (tmp_path / "vocab.json").unlink()
  with pytest.raises(errors.MissingInputError, match="directory that holds one"):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize(
  ("name", "content", "needle"),
  [
    ("tokenizer.json", b"{", "tokenizer.json cannot be read"),
    ("tokenizer.json", b'{"model": {"vocab": {}}}', "cannot be used"),
    ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken"),
    ("vocab.txt", b"a\nb\n", "not a WordPiece vocabulary"),
  ],
)
def test_files_that_are_something_else(name, content, needle, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(errors.DataError, match=needle) as caught:
    load_tokenizer(tmp_path / name)
  assert str(caught.value).count("\n") < 5


def test_a_vocabulary_of_words_may_name_its_special_tokens_in_angles(tmp_path):
  lines = ["<pad>", "<cls>", "<sep>", "<unk>", "<mask>", "a", "##b"]
  (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n")
  tokenizer = load_tokenizer(tmp_path)
  assert (tokenizer.unk_id, tokenizer.cls_id, tokenizer.mask_id) == (3, 1, 4)
  assert tokenizer.encode_batch(["ab x"], 1)[0].tolist() == [5, 6, 3]


def test_what_cannot_be_read_is_refused(byte_bpe, tmp_path, monkeypatch):
  config = {"tokenizer_class": "CLIPTokenizer"}
  folder = copy(byte_bpe, tmp_path / "x", tokenizer_config=config)
  with pytest.raises(errors.DataError, match=r"CLIPTokenizer.*\n.*tokenizer\.json"):
    load_tokenizer(folder)
  tree = json.loads(load_tokenizer(byte_bpe).model)
  wrong = tree | {"decoder": {"type": "BPEDecoder", "suffix": "</w>"}}
  with pytest.raises(errors.DataError, match="decoder BPEDecoder"):
    FastTokenizer(json.dumps(wrong).encode())
  token = tree["added_tokens"][0]
  wrong = tree | {"added_tokens": [token, token | {"id": 1005, "content": "<x>"}]}
  with pytest.raises(errors.DataError, match="1005 becomes 1000"):
    FastTokenizer(json.dumps(wrong).encode())
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(errors.ConfigError, match="pip install tokenizers"):
    load_tokenizer(byte_bpe)


@pytest.fixture(scope="module")
def sentences(english) -> list[str]:
  return sample_lines([english], 100_000)


def reference_model(lines, **options) -> bytes:
  import io

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    vocab_size=600,
    minloglevel=2,
    **options,
  )
  return model.getvalue()


@pytest.mark.parametrize("kind", ["bpe", "char", "unigram"])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_export_of_sentencepiece_gives_the_same_ids(
  kind, byte_fallback, sentences, english
):
  model = train_tokenizer(sentences, kind, 600, byte_fallback, ("<user>",))
  ours, made = Tokenizer(model), open_tokenizer(to_tokenizer_json(model))
  assert made.vocab_size == ours.vocab_size
  for role in ("pad", "bos", "eos", "unk", "mask", "cls", "sep"):
    assert getattr(made, f"{role}_id") == getattr(ours, f"{role}_id")
  assert made.is_lossless == ours.is_lossless == byte_fallback
  different = 0
  for text in [*TEXTS, *english.splitlines(keepends=True)[:3000]]:
    if not byte_fallback and SPACE_MARK in text:
      continue  # <unk> may include its neighbours
    expected, ids = ours.encode(text), made.encode(text)
    different += ids != expected
    assert ids == expected or (kind == "unigram" and sorted(ids) == sorted(expected))
    assert made.decode(expected) == ours.decode(expected)
  assert different <= 20 * (kind == "unigram")  # equally likely ways to spell spaces


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_export_keeps_a_dummy_prefix(kind, sentences):
  """A dummy prefix, as in Llama 2 and Mistral, loses no leading spaces."""
  options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
  model = reference_model(sentences, model_type=kind, byte_fallback=True, **options)
  original = sentencepiece.SentencePieceProcessor(model_proto=model)
  made = open_tokenizer(to_tokenizer_json(model))
  assert made.adds_prefix
  for text in ["a", " a", "  a", "\na", "\u2581a", *TEXTS]:
    assert sorted(made.encode(text)) == sorted(original.encode(text))
    assert kind == "unigram" or made.encode(text) == original.encode(text)
  assert made.encode("a") != made.encode(" a") != made.encode("  a")


@pytest.mark.parametrize(
  ("name", "most"), [("mistral-v1_32k", 0), ("t5-base_spiece", 20)]
)
def test_export_of_published_models(name, most, corpora):
  model = (corpora / "from_repos/tokenizers" / f"{name}.model").read_bytes()
  original = sentencepiece.SentencePieceProcessor(model_proto=model)
  made = open_tokenizer(to_tokenizer_json(model))
  different = [text for text in TEXTS if made.encode(text) != original.encode(text)]
  assert len(different) <= most  # T5's normaliser sees combined characters otherwise
  assert not set(different) & set(ODD)


def test_export_refuses_what_it_would_change(sentences):
  model = reference_model(
    sentences, model_type="bpe", user_defined_symbols=["<user>", "\t"]
  )
  with pytest.raises(errors.DataError, match=r"'<user>'.*\n.*\n.*tokenizer\.model"):
    to_tokenizer_json(model)
  model = reference_model(sentences, model_type="word")
  with pytest.raises(errors.DataError, match="type 3"):
    to_tokenizer_json(model)


@pytest.mark.parametrize("is_encoder", [False, True])
def test_transformers_loads_an_exported_tokenizer(is_encoder, bpe, tmp_path):
  transformers = pytest.importorskip("transformers")
  for name, content in export_files(bpe.model, 512, "{{ 1 }}", is_encoder).items():
    (tmp_path / name).write_bytes(content)
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
  assert theirs.model_max_length == 512 and theirs.chat_template == "{{ 1 }}"
  assert theirs.mask_token_id == bpe.mask_id and theirs.pad_token_id == bpe.pad_id
  theirs.model_max_length = 10**9
  for text in TEXTS:
    ids = theirs(text, add_special_tokens=False, split_special_tokens=True)
    assert ids["input_ids"] == bpe.encode(text)
    assert theirs.decode(bpe.encode(text)) == text
  end = [bpe.eos_id] * is_encoder
  assert theirs("a <mask>")["input_ids"] == [
    bpe.bos_id, *bpe.encode("a <mask>", specials=True), *end
  ]  # fmt: skip


@pytest.mark.parametrize("name", ["wordpiece", "byte_bpe"])
def test_transformers_loads_what_was_imported(name, request, tmp_path):
  transformers = pytest.importorskip("transformers")
  ours = load_tokenizer(request.getfixturevalue(name))
  for file, content in export_files(ours.model, 512).items():
    (tmp_path / file).write_bytes(content)
  theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
  assert_same_ids(ours, theirs)
  assert (theirs.cls_token_id, theirs.mask_token_id) == (
    (2, 4) if name == "wordpiece" else (None, None)
  )
  end = None if name == "wordpiece" else "<|endoftext|>"
  assert theirs.bos_token == theirs.eos_token == end
  assert load_tokenizer(tmp_path).sha256 == ours.sha256


@pytest.mark.parametrize("name", ["wordpiece", "byte_bpe"])
def test_prepare_with_it(name, request, text_config, tmp_path):
  folder = request.getfixturevalue(name)
  lines = [f"document {n} returns [MASK] <|endoftext|> values" for n in range(300)]
  (tmp_path / "texts/a.txt").write_text("\n".join(lines))
  file = {"wordpiece": "vocab.txt", "byte_bpe": "vocab.json"}[name]
  text_config.tokenizer.path = str(folder / file)
  report = build.build_store(text_config.data, text_config.tokenizer, lambda line: None)
  tok = load_tokenizer(folder / file)
  found = shards.Store(text_config.data.store)
  assert found.tokenizer == tok.model and found.tokenizer_sha256 == tok.sha256
  assert found.manifest["tokenizer"]["file"] == "tokenizer.json"
  for role in ("pad", "bos", "eos", "unk", "mask", "cls", "sep"):
    assert getattr(found, f"{role}_id") == getattr(tok, f"{role}_id")
  np.testing.assert_array_equal(found.continues_word, continues_word(tok))
  stream = found.stream("main", "train")
  ids = stream.read(0, stream.num_tokens)
  starts = stream.document_starts(0, stream.num_tokens)
  assert (ids[starts] == tok.bos_id).all() and ids[-1] == tok.eos_id
  first = ids[: starts[1]].tolist()
  assert tok.decode(first) in {tok.decode(tok.encode(line)) for line in lines}
  inside = np.setdiff1d(np.arange(len(ids)), [*starts, *starts[1:] - 1, len(ids) - 1])
  special = set(tok.special_tokens.values()) - {tok.unk_id}
  assert not np.isin(ids[inside], list(special)).any()
  assert report.changed == (report.checked if name == "wordpiece" else 0)
  again = build.build_store(text_config.data, text_config.tokenizer, lambda line: None)
  assert again.reused and again.tokenizer.sha256 == tok.sha256
  words = pathlib.Path(text_config.data.store) / manifest.WORDS_FILE
  words.write_bytes(bytes(len(words.read_bytes())))
  with pytest.raises(errors.DataError, match="damaged"):
    _ = shards.Store(text_config.data.store).continues_word


def test_the_pattern_of_qwen_is_that_of_transformers():
  qwen = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
  assert qwen.PRETOKENIZE_REGEX == QWEN_WORDS
