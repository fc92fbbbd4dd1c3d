"""Hostile and damaged tokenizer.json files: refused, quickly, and in our words."""

import base64
import json
import time

import pytest

from flaxlm import errors
from flaxlm.tokenizer.fast import FastTokenizer
from flaxlm.tokenizer.files import QWEN_WORDS, load_tokenizer
from flaxlm.tokenizer.rust_library import find_backtracking

tokenizers = pytest.importorskip("tokenizers")


def make(**changes) -> dict:
  vocab = {"a": 0, "b": 1, "ab": 2, "<u>": 3}
  model = tokenizers.models.BPE(vocab, [("a", "b")], unk_token="<u>")
  tree = json.loads(tokenizers.Tokenizer(model).to_str())
  model = tree["model"] | changes.pop("model", {})
  return tree | {"model": model} | changes


def split(regex: str) -> dict:
  return {
    "type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
    "invert": False,
  }  # fmt: skip


def token(i: object) -> dict:
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  return {"id": i, "content": "<x>", "special": True} | flags


def charsmap(content: bytes) -> dict:
  text = base64.b64encode(content).decode()
  return {"type": "Precompiled", "precompiled_charsmap": text}


def replacing(*sizes: int) -> dict:
  steps = [
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * size}
    for size in sizes
  ]
  return {"type": "Sequence", "normalizers": steps}


HOSTILE = {
  "huge added id": make(added_tokens=[token(4_000_000_000)]),
  "huge id": make(model={"vocab": {"a": 0, "b": 1, "ab": 4_000_000_000}}),
  "negative id": make(model={"vocab": {"a": 0, "b": 1, "ab": -2}}),
  "id as text": make(added_tokens=[token("4")]),
  "true as id": make(added_tokens=[token(True)]),
  "charsmap": make(normalizer=charsmap(b"junk" * 20)),
  "short charsmap": make(normalizer=charsmap(b"\0")),
  "long trie": make(normalizer=charsmap(b"\x40\0\0\0" + b"\xff" * 200)),
  "nested quantifiers": make(pre_tokenizer=split("(a+)+$")),
  "alternatives": make(pre_tokenizer=split("(b|bb)+$")),
  "replaced pattern": make(
    normalizer={"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}
  ),
  "pattern in a sequence": make(
    pre_tokenizer={"type": "Sequence", "pretokenizers": [split("(ab|ba|abab)+c")]}
  ),
  "no pattern": make(pre_tokenizer=split("(a+")),
  "growth": make(normalizer=replacing(100_000)),
  "growth by steps": make(normalizer=replacing(20, 20, 20)),
  "length 0": make(pre_tokenizer={"type": "FixedLength", "length": 0}),
  "no vocabulary": make(model={"vocab": None}),
  "list": make(model={"vocab": [1, 2]}),
  "tokens": make(added_tokens={"a": 1}),
  "decoder": make(decoder=3),
  "post-processor": make(post_processor={"type": "TemplateProcessing", "single": 3}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, capfd):
  start = time.thread_time()
  with pytest.raises(errors.DataError, match=r"tokenizer\.json"):
    FastTokenizer(json.dumps(HOSTILE[name]).encode())
  assert time.thread_time() - start < 10
  assert capfd.readouterr().err == ""  # no lines of the library's


@pytest.mark.parametrize(
  "content",
  [
    b'{"model": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    b'{"model": {"vocab": {"\xff": 1}}}',
    b'{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}}}',
    b'{"model": {"vocab": {"a": 1e999}}}',
    b"{",
  ],
)
def test_damaged_json(content, tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(content)
  with pytest.raises(errors.DataError):
    load_tokenizer(tmp_path)
  with pytest.raises(errors.DataError):
    FastTokenizer(content)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_bytes_that_are_no_utf8(name, tmp_path):
  (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
  (tmp_path / "merges.txt").write_text("a b\n")
  assert load_tokenizer(tmp_path).encode("ab") == [2]
  (tmp_path / name).write_bytes(b'{"\xff": 0}')
  with pytest.raises(errors.DataError):
    load_tokenizer(tmp_path)


def test_patterns_in_use_are_quick_enough():
  words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
  assert find_backtracking(words) == find_backtracking(QWEN_WORDS) == ""
  assert find_backtracking(r"\s+") == ""


def test_a_failure_of_the_library_later_is_an_error_of_the_file():
  """A pattern whose trap no probe knows fails when it meets the text, not before."""
  tree = make(pre_tokenizer=split(r"([\x{400}-\x{4FF}]+)+$"))
  tokenizer = FastTokenizer(json.dumps(tree).encode())
  text = "\u0431" * 60 + "!"
  for call in (
    lambda: tokenizer.encode(text),
    lambda: tokenizer.encode(text, specials=True),
    lambda: tokenizer.encode_batch([text, "a"], 2),
    lambda: list(tokenizer.encode_long([text], 1)),
  ):
    with pytest.raises(errors.DataError, match=r"the library fails: .*retry-limit"):
      call()


def test_randomness_of_training_is_off():
  """BPE dropout and unigram sampling would give each preparation other ids."""
  tree = make(model={"dropout": 0.5})
  tokenizer = FastTokenizer(json.dumps(tree).encode())
  text = "ab" * 50
  assert tokenizer.encode(text) == tokenizer.encode(text, specials=True) == [2] * 50
  library = tokenizers.Tokenizer.from_str(json.dumps(tree))
  assert any(library.encode(text).ids != [2] * 50 for _ in range(20))
  pieces = [["<unk>", 0.0], ["a", -1.0], ["b", -1.0], ["ab", -1.5]]
  sampled = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
  tree = make() | {"model": sampled | {"alpha": 0.1, "nbest_size": 64}}
  tokenizer = FastTokenizer(json.dumps(tree).encode())
  assert tokenizer.encode(text) == tokenizer.encode(text, specials=True) == [3] * 50
