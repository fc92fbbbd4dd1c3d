import random

import numpy as np
import pytest
import sentencepiece

from flaxlm import errors
from flaxlm.tokenizer.export import export_files
from flaxlm.tokenizer.files import load_tokenizer, open_tokenizer
from flaxlm.tokenizer.pieces import Decoder, cut
from flaxlm.tokenizer.sentencepiece import Tokenizer, sample_lines, train_tokenizer

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
  "\u2585\u2047\uffff\U0010ffff\ue000",
  "<mask><pad></s><0x0A><unk> [MASK]",
  "1234567890" * 3,
  "漢字" * 500,
]


def random_text(rng: random.Random) -> str:
  """Characters of all planes, and runs of those that tokenizers treat specially."""
  pools = [
    lambda: chr(rng.randrange(0x80)),
    lambda: chr(rng.randrange(0x800)),
    lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
    lambda: rng.choice(" \n\t\r\0\u2581\u3000\u00a0\u200b\ufeff") * rng.randrange(1, 9),
    lambda: rng.choice(["the ", "self.", "def ", "<mask>", "中文", "か゛", "😀"]),
  ]
  return "".join(rng.choice(pools)() for _ in range(rng.randrange(60)))


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_any_text_survives(kind, english):
  lines = sample_lines([english], 100_000)
  tok = Tokenizer(train_tokenizer(lines, kind, 600 if kind != "char" else 400))
  assert tok.is_lossless and tok.loss == ""
  rng = random.Random(0)
  for text in ODD + [random_text(rng) for _ in range(1500)] + [english[:200_000]]:
    assert tok.decode(tok.encode(text)) == text
    assert tok.unk_id not in tok.encode(text)


@pytest.mark.parametrize(
  "name",
  ["song_ci_zh_hans", "tang_poems_zh_hant", "wagahaiwa_nekodearu_ja", "botchan_en"],
)
def test_real_languages_survive(name, corpora, bpe):
  text = (corpora / "from_repos/corpora" / f"{name}.txt").read_text("utf-8")[:100_000]
  own = Tokenizer(train_tokenizer(sample_lines([text], 10**6), "bpe", 6000))
  assert own.decode(own.encode(text)) == text
  assert bpe.decode(bpe.encode(text)) == text  # not trained on this script
  assert len(own.encode(text)) < len(bpe.encode(text))


def test_special_tokens_cannot_be_forged(english):
  lines = sample_lines([english], 100_000) + ["<mask> <user> <pad>"] * 500
  symbols = ("<user>", "<user>+")
  tok = Tokenizer(train_tokenizer(lines, "bpe", 600, user_symbols=symbols))
  ids = [tok.pad_id, tok.bos_id, tok.eos_id, tok.unk_id]
  ids += [tok.mask_id, tok.cls_id, tok.sep_id, tok.control_id("<user>")]
  ids.append(tok.control_id("<none>", "<user>+"))
  assert ids == list(range(9))
  text = "<pad><bos><eos><unk><mask><cls><sep><user>+"
  assert min(tok.encode(text)) >= 9
  assert tok.decode(tok.encode(text)) == text
  assert tok.decode([1, *tok.encode("a b"), 4, 7, 2, 0]) == "a b"
  # A template may. The longest name counts, and text in between is plain.
  assert tok.special_tokens["<user>"] == 7 and "<unk>" not in tok.special_tokens
  whole = tok.encode("<bos>a <user><user>+<eos", specials=True)
  assert whole == [1, *tok.encode("a "), 7, 8, *tok.encode("<eos")]


def test_ids_do_not_depend_on_where_a_text_is_cut(bpe, english):
  whole = sentencepiece.SentencePieceProcessor(model_proto=bpe.model).encode(english)
  assert bpe.encode(english) == whole
  lines = bpe.encode_batch(english.splitlines(keepends=True), num_threads=2)
  assert np.concatenate(lines).tolist() == whole
  small = bpe.encode_batch(list(cut(english, 100)))  # before words, too
  assert np.concatenate(small).tolist() == whole


def test_cut_keeps_the_text_and_the_limit():
  rng = random.Random(1)
  for _ in range(300):
    text = "".join(rng.choice("ab  \n") for _ in range(rng.randrange(200)))
    parts = list(cut(text, 16))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 16
    assert text == "" or all(parts)


def test_cut_prefers_single_spaces():
  assert list(cut("aa bb\n\ncc", 8)) == ["aa", " bb\n\ncc"]
  assert list(cut("aa  bb\n\ncc", 9)) == ["aa  bb\n\n", "cc"]
  assert list(cut("aa  bbcc", 6)) == ["aa", "  bbcc"]
  assert list(cut("a b\ncd ef", 8, whole_lines=True)) == ["a b\n", "cd ef"]


def test_streamed_text_never_holds_half_a_character(bpe):
  text = "naïve 漢字 😀\u2581 end\n"
  ids = bpe.encode(text)
  decode = Decoder(bpe)
  parts = [decode([i]) for i in ids] + [decode([], final=True)]
  assert "".join(parts) == text
  assert "\ufffd" not in "".join(parts)
  assert "" in parts  # it waited for the rest of a character
  half = bpe.encode("漢")[:-1]
  assert bpe.decode(half).startswith("\ufffd")  # never complete: shown, not raised
  with pytest.raises(ValueError, match="not in 0"):
    bpe.decode([-1])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(kind, english):
  lines = sample_lines([english], 50_000)
  assert train_tokenizer(lines, kind, 500) == train_tokenizer(lines, kind, 500)
  assert train_tokenizer(lines, kind, 500) != train_tokenizer(lines[1:], kind, 500)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("size", [10, 270, 50_000])
def test_impossible_vocabulary_names_one_that_works(kind, size, english):
  lines = sample_lines([english], 20_000)
  with pytest.raises(errors.ConfigError) as caught:
    train_tokenizer(lines, kind, size)
  assert caught.value.key == "config.tokenizer.vocab_size"
  hint = int(str(caught.value).split()[-1])
  assert Tokenizer(train_tokenizer(lines, kind, hint)).vocab_size == hint


def test_characters_without_bytes(english):
  model = train_tokenizer(["abc", "cab d"], "char", 5000, byte_fallback=False)
  tok = Tokenizer(model)
  assert tok.vocab_size == 7 + 2 + 5  # special tokens, newline and tab, "abcd "
  assert not tok.is_lossless and "letters" not in tok.loss
  assert tok.encode("a\u2581é")[1:] == [tok.unk_id] * 2
  assert tok.decode(tok.encode("aéb")) == "a\ufffdb"
  with pytest.raises(errors.ConfigError, match=r"vocab_size.*\n.*\n.*at least 266"):
    train_tokenizer(["abc"], "char", 20)


@pytest.mark.parametrize(
  ("name", "loss"),
  [
    ("mistral-v1_32k", "U+2581"),
    ("bpe_32k_c4", "U+2581"),
    ("t5-base_spiece", "spaces"),
    ("sp_test_ja_model", "spaces"),
  ],
)
def test_models_of_others(name, loss, corpora):
  tok = load_tokenizer(corpora / "from_repos/tokenizers" / f"{name}.model")
  reference = sentencepiece.SentencePieceProcessor(model_proto=tok.model)
  assert not tok.is_lossless and loss in tok.loss
  for text in ["", "Hello  world", " a\nb", "naïve 😀 x", "def f(x):\n    return 1"]:
    ids = tok.encode(text)
    assert ids == reference.encode(text)
    if tok.unk_id not in ids:
      assert tok.decode(ids) == reference.decode(ids)


def test_wrong_model_files(tmp_path, bpe):
  with pytest.raises(errors.MissingInputError, match=r"config\.tokenizer\.path"):
    load_tokenizer(tmp_path / "none.model")
  (tmp_path / "x.model").write_bytes(bpe.model[: len(bpe.model) // 2])
  with pytest.raises(errors.DataError, match="not a SentencePiece model"):
    load_tokenizer(tmp_path / "x.model")
  for damaged in (b"", b"junk", bpe.model.replace("▁".encode(), b"\xe2\x96\xff", 1)):
    with pytest.raises(errors.DataError, match="SentencePiece model cannot be read"):
      Tokenizer(damaged)  # as stores and runs open theirs
  (tmp_path / "x.model").write_bytes(bpe.model)
  assert load_tokenizer(tmp_path / "x.model").sha256 == bpe.sha256


@pytest.mark.parametrize("symbols", [("<pad>",), ("<a>", "<a>"), (" ",), ("\n",)])
def test_wrong_user_symbols(symbols):
  with pytest.raises(errors.ConfigError, match="user_symbols"):
    train_tokenizer(["abc"], "char", 300, user_symbols=symbols)


def test_sample_is_spread_evenly_and_bounded():
  texts = [f"{number:05}\n" * 100 for number in range(5000)]  # 3 MB
  lines = sample_lines(iter(texts), 60_000)
  size = sum(len(line) + 1 for line in lines)
  assert 50_000 < size < 70_000
  numbers = np.unique([int(line) for line in lines])
  assert len(numbers) > 80 and np.diff(numbers).max() < 3 * np.diff(numbers).min()
  assert numbers.min() < 100 and numbers.max() > 4900
  assert lines == sample_lines(iter(texts), 60_000)
  assert sample_lines(["a\0b\u2581c\n\n"], 100) == ["a", "b", "c"]
  assert sample_lines([], 100) == []


@pytest.mark.parametrize("text", ["a\ud800", "\udcff b"])
def test_half_of_a_surrogate_pair_is_refused(bpe, text):
  files = export_files(bpe.model, 64, "", False)
  for tokenizer in (bpe, open_tokenizer(files["tokenizer.json"])):
    for encode in (tokenizer.encode, lambda t: tokenizer.encode(t, True)):  # noqa: B023
      with pytest.raises(errors.DataError, match="half of a surrogate pair"):
        encode(text)
