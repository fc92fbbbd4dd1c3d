"""Tokens and rules that only the files beside a tokenizer declare."""

import json

import pytest
import sentencepiece

from flaxlm import errors
from flaxlm.inference.text import tokenize_prompt
from flaxlm.tokenizer.export import export_files
from flaxlm.tokenizer.files import load_tokenizer, open_tokenizer

tokenizers = pytest.importorskip("tokenizers")


def token(name: str, special: bool = True) -> dict:
  return {"content": name, "special": special}


def write(folder, main: dict[str, bytes], **files: dict):
  for name, content in main.items():
    (folder / name).write_bytes(content)
  for name, tree in files.items():
    (folder / f"{name}.json").write_text(json.dumps(tree))
  return folder


def words_json(post_processor=None, **model) -> bytes:
  vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c"])}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(["<s>", "</s>"])
  tree = json.loads(made.to_str()) | {"post_processor": post_processor}
  return json.dumps(tree | {"model": tree["model"] | model}).encode()


NUMBERED = {
  "added_tokens_decoder": {"N": token("<|user|>"), "N+1": token("<t>", False)}
}
DECLARED = {
  "tokenizer_config": (NUMBERED, {}, {}),
  "additional": ({"additional_special_tokens": ["<|user|>", "<t>"]}, {}, {}),
  "extra": ({"extra_special_tokens": {"x": "<|user|>", "y": "<t>"}}, {}, {}),
  "map": ({}, {"additional_special_tokens": [token("<|user|>"), "<t>"]}, {}),
  "added": ({}, {"eos_token": "<|user|>"}, {"<|user|>": "N", "<t>": "N+1"}),
}


@pytest.mark.parametrize("kind", ["model", "json"])
@pytest.mark.parametrize("where", DECLARED)
def test_tokens_of_any_file_are_tokens(where, kind, bpe, tmp_path):
  main = {"tokenizer.model": bpe.model} if kind == "model" else {
    "tokenizer.json": words_json()
  }  # fmt: skip
  size = bpe.vocab_size if kind == "model" else 6
  text = json.dumps(DECLARED[where]).replace('"N+1": {', f'"{size + 1}": {{')
  text = text.replace('"N": {', f'"{size}": {{').replace('"N+1"', f"{size + 1}")
  config, special, added = json.loads(text.replace('"N"', f"{size}"))
  names = {"bos_token": "<bos>", "eos_token": "<eos>"} if kind == "model" else {
    "bos_token": "<s>", "eos_token": "</s>"
  }  # fmt: skip
  folder = write(
    tmp_path, main, tokenizer_config=config, added_tokens=added,
    special_tokens_map=names | special,
  )  # fmt: skip
  tokenizer = load_tokenizer(folder)
  assert tokenizer.vocab_size == size + 2
  ids = tokenizer.encode("a<|user|>", specials=True)
  assert ids[-1] == size and ids[:-1] == tokenizer.encode("a")
  assert size not in tokenizer.encode("a<|user|> b")  # text cannot forge it
  is_text = where in ("tokenizer_config", "added")
  assert (size + 1 in tokenizer.encode("a <t>")) == is_text
  assert tokenizer.control_id("<t>") == (-1 if is_text else size + 1)
  usual = bpe.eos_id if kind == "model" else 2
  assert tokenizer.eos_id == (size if where == "added" else usual)
  assert open_tokenizer(tokenizer.model).special_tokens == tokenizer.special_tokens
  assert load_tokenizer(folder).sha256 == tokenizer.sha256


def test_ids_stay_as_declared(bpe, tmp_path):
  size = bpe.vocab_size
  folder = write(
    tmp_path, {"tokenizer.model": bpe.model},
    tokenizer_config={"added_tokens_decoder": {f"{size + 2}": token("<|user|>")},
                      "additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"],
                      "pad_token": None, "eos_token": "<|user|>"},
  )  # fmt: skip
  tokenizer = load_tokenizer(folder)
  assert tokenizer.special_tokens["<|user|>"] == tokenizer.eos_id == size + 2
  # T5 numbers its sentinels from the end.
  assert tokenizer.special_tokens["<extra_id_0>"] == size + 4
  assert tokenizer.pad_id == -1 and tokenizer.bos_id == bpe.bos_id
  text = "def f(x):  # <|user|>"
  assert tokenizer.encode(text) == bpe.encode(text)
  assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.is_lossless
  library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
  assert library.vocab_size() == size + 5
  exported = open_tokenizer(export_files(tokenizer.model, 64)["tokenizer.json"])
  assert tokenizer.special_tokens.items() <= exported.special_tokens.items()


@pytest.mark.parametrize(
  "config",
  [
    {"added_tokens_decoder": {"300": token("<|user|>")}},
    {"added_tokens_decoder": {"4000000000": token("<|user|>")}},
    {"added_tokens_decoder": {"900000": token("<|user|>")}},
    {"added_tokens_decoder": {"x": token("<|user|>")}},
    {"added_tokens_decoder": {"1000": {"special": True}}},
    {"added_tokens_decoder": [1, 2]},
    {"additional_special_tokens": 3},
    {"additional_special_tokens": [None]},
    {"bos_token": {"x": 1}},
    {"chat_template": 7},
    {"chat_template": [{"name": "default"}]},
  ],
)
def test_files_beside_that_cannot_be_used(config, bpe, tmp_path):
  folder = write(tmp_path, {"tokenizer.model": bpe.model}, tokenizer_config=config)
  with pytest.raises(errors.DataError, match=r"tokenizer"):
    load_tokenizer(folder)


def test_bytes_beside_that_are_no_text(bpe, tmp_path):
  folder = write(tmp_path, {"tokenizer.model": bpe.model})
  (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{ 1 }}")
  with pytest.raises(errors.DataError, match="UnicodeDecodeError"):
    load_tokenizer(folder)


@pytest.mark.parametrize("adds", [None, True, False])
def test_bos_of_a_sentencepiece_tokenizer(adds, bpe, tmp_path):
  config = {} if adds is None else {"add_bos_token": adds}
  folder = write(tmp_path, {"tokenizer.model": bpe.model}, tokenizer_config=config)
  tokenizer = load_tokenizer(folder)
  begin = [] if adds is False else [bpe.bos_id]
  assert tokenizer.bos_id == bpe.bos_id
  assert tokenize_prompt(tokenizer, "a") == begin + bpe.encode("a")
  assert tokenize_prompt(tokenizer, "") == [bpe.bos_id]  # begins a document
  # The rule is kept in the one file, and exported.
  kept = tmp_path / "run"
  kept.mkdir()
  write(kept, {"tokenizer.model": tokenizer.model})
  for again in (load_tokenizer(kept), load_tokenizer(kept / "tokenizer.model")):
    assert again.sha256 == tokenizer.sha256 and again.begin_ids == begin
  out = tmp_path / "out"
  out.mkdir()
  write(out, export_files(tokenizer.model, 64))
  assert load_tokenizer(out).begin_ids == begin
  assert open_tokenizer((out / "tokenizer.json").read_bytes()).begin_ids == begin
  assert (tokenizer.sha256 == bpe.sha256) == (adds is not False)


def test_bos_of_a_tokenizer_json(tmp_path):
  bos = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
  text = {"Sequence": {"id": "A", "type_id": 0}}
  name = {"SpecialToken": {"id": "<s>", "type_id": 0}}
  template = {"type": "TemplateProcessing", "pair": [text], "special_tokens": bos}
  cases = {
    "before": (template | {"single": [name, text]}, [1]),
    "after": (template | {"single": [text, name]}, []),
    "sequence": (
      {"type": "Sequence", "processors": [template | {"single": [name, text]}]}, [1]
    ),
    "none": (None, []),
    "roberta": (
      {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1],
       "trim_offsets": True, "add_prefix_space": False}, [1]
    ),
  }  # fmt: skip
  for case, (step, begin) in cases.items():
    main = {"tokenizer.json": words_json(step)}
    folder = tmp_path / case
    folder.mkdir()
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = load_tokenizer(write(folder, main, tokenizer_config=config))
    assert tokenizer.bos_id == 1 and tokenizer.begin_ids == begin, case
    assert tokenize_prompt(tokenizer, "a") == [*begin, 3]
    theirs = tokenizers.Tokenizer.from_str(main["tokenizer.json"].decode())
    assert (
      tokenize_prompt(tokenizer, "a")
      == [i for i in theirs.encode("a").ids if case != "after" or i != 1][
        : len(begin) + 1
      ]
    )
