"""Loads tokenizers of SentencePiece and Hugging Face, and keeps each as one file.

A store or a run keeps its tokenizer as the bytes of one file: a SentencePiece
`tokenizer.model`, or a `tokenizer.json` to which we add what the files beside it say
(which token begins a text, whether text is lower-cased, the chat template). A vocab.txt
or vocab.json is converted to such a tokenizer.json.
"""

import json
import os
import pathlib

from flaxlm import errors
from flaxlm.json_files import read_json
from flaxlm.tokenizer.declared_tokens import NO_BOS, declare
from flaxlm.tokenizer.fast import (
  CHAT_TEMPLATE,
  SPECIAL_IDS,
  SPECIAL_ROLES,
  USUAL_NAMES,
  FastTokenizer,
  fill_roles,
  ids_before,
  read_vocabulary,
)
from flaxlm.tokenizer.files_beside import FilesBeside, added_token
from flaxlm.tokenizer.pieces import SPACE_MARK
from flaxlm.tokenizer.rust_library import unreadable
from flaxlm.tokenizer.sentencepiece import Tokenizer

AnyTokenizer = Tokenizer | FastTokenizer

MODEL, JSON = "tokenizer.model", "tokenizer.json"
MODELS = (MODEL, "spiece.model")  # in a directory
MERGES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
# Tokenizer classes whose vocab.json is GPT-2's byte-level BPE, without "Tokenizer".
GPT2_LIKE = ("", "GPT2", "Roberta", "Bart", "Longformer", "CodeGen", "GPTNeoX")
# How Qwen2 splits text before BPE, as in its tokenizer.json.
QWEN_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def open_tokenizer(content: bytes) -> AnyTokenizer:
  """Opens the bytes of a tokenizer.json or of a SentencePiece model."""
  return FastTokenizer(content) if is_json(content) else Tokenizer(content)


def is_json(content: bytes) -> bool:
  """Returns whether the bytes of a tokenizer are a tokenizer.json."""
  return content[:1] == b"{"


def file_name(content: bytes) -> str:
  """Returns the name of a tokenizer's file in a store or a run, from its bytes."""
  return JSON if is_json(content) else MODEL


def find_tokenizer(directory: str | os.PathLike) -> pathlib.Path | None:
  """Returns the tokenizer file of a store or a run, or None if it has none yet."""
  paths = [pathlib.Path(directory) / name for name in (MODEL, JSON)]
  return next((path for path in paths if path.exists()), None)


def load_tokenizer(path: str | os.PathLike) -> AnyTokenizer:
  """Loads a tokenizer of SentencePiece or Hugging Face.

  Args:
    path: a SentencePiece model; a tokenizer.json; a vocab.json with its merges.txt, or
      an encoder.json with its vocab.bpe (byte-level BPE); a vocab.txt (WordPiece); or a
      directory that holds one of these. If a directory holds a SentencePiece model and
      a tokenizer.json with the same pieces and special tokens, the model is used: the
      JSON was made from it, and many conversions lose leading spaces.

  The files tokenizer_config.json, special_tokens_map.json and added_tokens.json beside
  it give the special tokens, do_lower_case, strip_accents, tokenize_chinese_chars and
  add_prefix_space. By default, a vocab.txt that lacks any of A-Z is lower-cased, and
  special tokens are found by their usual names.

  Raises:
    MissingInputError: the file does not exist, or only half of a pair does.
    DataError: the file is not a tokenizer.
  """
  file = pathlib.Path(path).expanduser()
  if file.is_dir():
    file = choose_file(file)
  if not file.is_file():
    raise missing_tokenizer(path, file)
  content = file.read_bytes()
  pairs = {merges: vocab for vocab, merges in MERGES.items()}
  if file.name in pairs:
    file = file.with_name(pairs[file.name])
    if not file.is_file():
      raise missing_tokenizer(path, file)
    content = file.read_bytes()
  if is_json(content):
    tree = read_json(file)
    beside = FilesBeside(file.parent)
    if isinstance(tree.get("model"), dict):  # in a vocab.json, "model" may be a token
      return FastTokenizer(keep_roles(content, tree, beside))
    return FastTokenizer(byte_level(path, file, tree, beside))
  if file.suffix == ".txt":
    return FastTokenizer(word_piece(file, content, FilesBeside(file.parent)))
  try:
    tokenizer = Tokenizer(content)
  except errors.DataError as error:
    raise errors.DataError(
      f"config.tokenizer.path={path} is not a SentencePiece model",
      f"{file.absolute()}, {len(content)} bytes",
      "a .model file of SentencePiece (not .vocab, not tiktoken's), a tokenizer.json, "
      "a vocab.json with its merges.txt, or a vocab.txt",
    ) from error
  beside = FilesBeside(file.parent)
  declared = declare(content, beside, puts_bos(file, content, beside))
  return tokenizer if declared == content else Tokenizer(declared)


def puts_bos(model: pathlib.Path, content: bytes, beside: FilesBeside) -> bool:
  """Returns whether a SentencePiece tokenizer begins texts with bos, as Llama's does.

  A tokenizer.json made from the model says so, else tokenizer_config.json may.
  """
  whole = model.with_name(JSON)
  if model.name in MODELS and whole.is_file():
    return bool(ids_before(read_json(whole)))
  return bool(beside.settings.get("add_bos_token", not content.endswith(NO_BOS)))


def missing_tokenizer(path: object, file: pathlib.Path) -> errors.UserError:
  """Returns the error for config.tokenizer.path, where `file` does not exist."""
  return errors.MissingInputError(
    f"config.tokenizer.path={path} does not exist",
    file.absolute(),
    "a SentencePiece .model, a tokenizer.json, a vocab.json with its merges.txt, "
    "a vocab.txt, or a directory that holds one of these",
    "--config.tokenizer.path=  (an empty path trains a tokenizer)",
  )


def choose_file(directory: pathlib.Path) -> pathlib.Path:
  """Returns the file of a directory that is its tokenizer; see `load_tokenizer`."""
  models = [directory / name for name in MODELS]
  model = next((file for file in models if file.is_file()), None)
  whole = directory / JSON
  if whole.is_file():
    return model if model and are_the_same(model, whole) else whole
  pairs = [directory / vocab for vocab in MERGES]
  found = [
    file for file in (model, *pairs, directory / "vocab.txt") if file and file.is_file()
  ]
  return found[0] if found else whole


def are_the_same(model: pathlib.Path, whole: pathlib.Path) -> bool:
  """Returns whether a model has the pieces and special tokens of a tokenizer.json."""
  try:
    own = Tokenizer(model.read_bytes())
  except errors.DataError:  # files of tiktoken have this name too
    return False
  tree = read_json(whole)
  try:
    added = tree.get("added_tokens") or []
    specials = {token["content"]: token["id"] for token in added if token["special"]}
    pieces = read_vocabulary(tree) | {token["id"]: token["content"] for token in added}
    spaces = {i: piece.replace(" ", SPACE_MARK) for i, piece in pieces.items()}
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise unreadable(f"{whole}: {type(error).__name__}: {error}") from error
  unknown = {own.piece(own.unk_id)} if own.unk_id >= 0 else set()
  return specials.keys() - unknown <= own.special_tokens.keys() and spaces == {
    i: own.piece(i) for i in range(own.vocab_size)
  }


def keep_roles(content: bytes, tree: dict, beside: FilesBeside) -> bytes:
  """Returns a tokenizer.json that also holds the id of each role."""
  if SPECIAL_IDS in tree["model"]:
    return content  # flaxlm wrote this file
  try:
    added = tree["added_tokens"] = tree.get("added_tokens") or []
    pieces = {piece: i for i, piece in read_vocabulary(tree).items()}
    ids = pieces | {token["content"]: token["id"] for token in added}
    known = {token["content"]: token for token in added}
    for token in beside.declared(ids):
      if token["content"] in known:
        known[token["content"]]["special"] |= token["special"]
      else:
        added.append({"id": token["id"], **token})
        ids[token["content"]] = token["id"]
    specials = {token["content"] for token in added if token["special"]}
    roles = find_roles(beside, ids, specials)
  except (KeyError, TypeError, AttributeError) as error:
    raise unreadable(f"{type(error).__name__}: {error}") from error
  names = {token["content"] for token in added}
  for name in {name for name, i in ids.items() if i in roles.values()} - names:
    added.append({"id": ids[name], **added_token(name), "special": True})
  for token in added:
    token["special"] |= token["id"] in roles.values()
  tree["added_tokens"] = sorted(added, key=lambda token: token["id"])
  return write_tokenizer_json(tree, roles, beside.chat_template)


def find_roles(
  beside: FilesBeside, ids: dict[str, int], specials: set
) -> dict[str, int]:
  """Returns the id of each role: from the files beside, else by the usual names."""
  named = beside.names()
  roles = {}
  for role in SPECIAL_ROLES:
    if role not in named:
      known = [name for name in USUAL_NAMES[role] if name in specials]
      # Files that name some special tokens, but no bos or eos, mean that there is none.
      if not known or (named and role in ("bos", "eos")):
        continue
      roles[role] = ids[known[0]]
    elif named[role] is not None:
      if named[role] not in ids:
        raise errors.DataError(
          "a special token is not in the vocabulary",
          f"{role}_token {named[role]!r} in {beside.where}",
          "a token of the tokenizer",
        )
      roles[role] = ids[named[role]]
  return fill_roles(roles)


def write_tokenizer_json(
  tree: dict, roles: dict[str, int], chat_template: str
) -> bytes:
  """Returns the bytes of a tokenizer.json that holds the roles and the template."""
  tree = tree | {"truncation": None, "padding": None}
  tree["model"] = tree["model"] | {SPECIAL_IDS: roles}
  if chat_template:
    tree["model"][CHAT_TEMPLATE] = chat_template
  return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()


def assemble(vocab: dict[str, int], beside: FilesBeside, parts: dict) -> bytes:
  """Returns a tokenizer.json made of a vocabulary, the files beside it and `parts`.

  Args:
    parts: the entries of tokenizer.json that say how text is split and joined.
  """
  tokens = {token["content"]: token for token in beside.tokens.values()}
  tokens |= {t["content"]: t for t in beside.specials() if t["content"] not in tokens}
  for known in (*USUAL_NAMES.values(), ("[UNK]", "<unk>")):
    for name in known:
      if name in vocab and not beside.names() and name not in tokens:
        tokens[name] = added_token(name) | {"special": True}
  ids = vocab | {token["content"]: i for i, token in beside.tokens.items()}
  unknown = [name for name in tokens if name not in ids]
  if unknown:
    raise errors.DataError(
      "special tokens are not in the vocabulary",
      f"{unknown[:5]}, named in {beside.where}",
      "tokens of the vocabulary, or of added_tokens.json",
    )
  added = [{"id": ids[name], **token} for name, token in tokens.items()]
  tree = {
    "version": "1.0",
    "added_tokens": sorted(added, key=lambda token: token["id"]),
    **parts,
  }
  specials = {token["content"] for token in added if token["special"]}
  return write_tokenizer_json(
    tree, find_roles(beside, ids, specials), beside.chat_template
  )


def word_piece(file: pathlib.Path, content: bytes, beside: FilesBeside) -> bytes:
  """Converts a vocab.txt to a tokenizer.json, as BERT reads it (Devlin et al. 2018)."""
  try:
    lines = content.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
  except UnicodeDecodeError as error:
    raise unreadable(f"{file}: {error}") from error
  vocab = {line: i for i, line in enumerate(lines)}

  def usual(*names: str) -> str:
    return next((name for name in names if name in vocab), names[0])

  unknown = beside.names().get("unk") or usual("[UNK]", "<unk>")
  if unknown not in vocab:
    raise errors.DataError(
      f"config.tokenizer.path={file} is not a WordPiece vocabulary",
      f"{len(lines)} lines, none of them {unknown}",
      "a vocab.txt of BERT: one piece per line, special tokens too",
    )
  settings = beside.settings
  has_capitals = all(chr(letter) in vocab for letter in range(ord("A"), ord("Z") + 1))
  names = {role: usual(*USUAL_NAMES[role]) for role in ("cls", "sep")} | beside.names()
  cls, sep = names["cls"], names["sep"]
  parts = {
    "normalizer": {
      "type": "BertNormalizer",
      "clean_text": True,
      "handle_chinese_chars": bool(settings.get("tokenize_chinese_chars", True)),
      "strip_accents": settings.get("strip_accents"),
      "lowercase": bool(settings.get("do_lower_case", not has_capitals)),
    },
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": None,
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": {
      "type": "WordPiece",
      "unk_token": unknown,
      "continuing_subword_prefix": "##",
      "max_input_chars_per_word": 100,
      "vocab": vocab,
    },
  }
  if cls in vocab and sep in vocab:
    parts["post_processor"] = special_token_step({cls: vocab[cls]}, {sep: vocab[sep]})
  return assemble(vocab, beside, parts)


def special_token_step(before: dict[str, int], after: dict[str, int]) -> dict:
  """Returns the library's step that puts special tokens around one text, or two."""

  def specials(names, kind):
    return [{"SpecialToken": {"id": name, "type_id": kind}} for name in names]

  single = [*specials(before, 0), {"Sequence": {"id": "A", "type_id": 0}}]
  single += specials(after, 0)
  second = [{"Sequence": {"id": "B", "type_id": 1}}, *specials(after, 1)]
  tokens = {
    name: {"id": name, "ids": [i], "tokens": [name]}
    for name, i in (before | after).items()
  }
  return {
    "type": "TemplateProcessing",
    "single": single,
    "pair": single + second,
    "special_tokens": tokens,
  }


def byte_level(
  path: object, file: pathlib.Path, vocab: dict[str, int], beside: FilesBeside
) -> bytes:
  """Converts a vocab.json and its merges to a tokenizer.json (Radford et al. 2019)."""
  merges = file.with_name(MERGES.get(file.name, "merges.txt"))
  if not merges.is_file():
    raise missing_tokenizer(path, merges)
  kind = str(beside.settings.get("tokenizer_class") or "").removesuffix("Fast")
  kind = kind.removesuffix("Tokenizer")
  is_qwen = kind == "Qwen2"
  if kind not in GPT2_LIKE and not is_qwen:
    raise errors.DataError(
      f"config.tokenizer.path={path} does not say how it splits text into words",
      f"{beside.settings['tokenizer_class']} without its tokenizer.json",
      "the tokenizer.json, which does",
    )
  try:
    lines = merges.read_text("utf-8").replace("\r\n", "\n").split("\n")
  except UnicodeDecodeError as error:
    raise unreadable(f"{merges}: {error}") from error
  lines = lines[1:] if lines[0].startswith("#version") else lines
  space = bool(beside.settings.get("add_prefix_space", False))
  words = {
    "type": "ByteLevel",
    "add_prefix_space": space,
    "trim_offsets": True,
    "use_regex": not is_qwen,
  }
  split = {"type": "Split", "pattern": {"Regex": QWEN_WORDS}}
  split |= {"behavior": "Isolated", "invert": False}
  parts = {
    "normalizer": {"type": "NFC"} if is_qwen else None,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, words]}
    if is_qwen
    else words,
    "post_processor": None,
    "decoder": words | {"use_regex": True},
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": "",
      "end_of_word_suffix": "",
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": False,
      "vocab": vocab,
      "merges": [line.split(" ") for line in lines if line.strip()],
    },
  }
  return assemble(vocab, beside, parts)
