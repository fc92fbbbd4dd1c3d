"""Which files hold a tokenizer, and the one file that a store or a run keeps of them.

What is kept is always the bytes of one file: a SentencePiece `tokenizer.model`, or a
`tokenizer.json` that holds what the files beside it said, too (which token begins a
text, whether it is lower-cased, the chat template). vocab.txt and vocab.json become
such a file here.
"""

import json
import os
import pathlib

from flaxlm import errors
from flaxlm.tokenizer.fast import (
  CHAT_TEMPLATE,
  KNOWN,
  SPECIAL_IDS,
  SPECIAL_ROLES,
  FastTokenizer,
  fill_roles,
  read_vocabulary,
  unreadable,
)
from flaxlm.tokenizer.sentencepiece import Tokenizer

AnyTokenizer = Tokenizer | FastTokenizer

MODEL, JSON = "tokenizer.model", "tokenizer.json"
MERGES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
# Classes whose vocab.json is GPT-2's byte-level BPE, by the first part of their names.
GPT2_LIKE = ("", "GPT2", "Roberta", "Bart", "Longformer", "CodeGen", "GPTNeoX")
# How Qwen2 parts text before BPE, as its tokenizer.json says.
QWEN_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def open_tokenizer(content: bytes) -> AnyTokenizer:
  """The tokenizer that these bytes are: a tokenizer.json or a SentencePiece model."""
  return FastTokenizer(content) if is_json(content) else Tokenizer(content)


def is_json(content: bytes) -> bool:
  return content[:1] == b"{"


def file_name(content: bytes) -> str:
  """What a tokenizer of these bytes is called in a store or a run."""
  return JSON if is_json(content) else MODEL


def find_tokenizer(directory: str | os.PathLike) -> pathlib.Path | None:
  """The file under which a store or a run keeps its tokenizer, if it has one yet."""
  paths = [pathlib.Path(directory) / name for name in (MODEL, JSON)]
  return next((path for path in paths if path.exists()), None)


def load_tokenizer(path: str | os.PathLike) -> AnyTokenizer:
  """Loads a tokenizer of SentencePiece or Hugging Face.

  Args:
    path: a SentencePiece model; a tokenizer.json; a vocab.json with its merges.txt, or
      an encoder.json with its vocab.bpe (byte-level BPE); a vocab.txt (WordPiece); or a
      directory that holds one of these. A directory with a SentencePiece model and a
      tokenizer.json of the same pieces and special tokens means the former: it is what
      the latter was made from, and keeps leading spaces that many conversions lose.

  Of tokenizer_config.json, special_tokens_map.json and added_tokens.json beside the
  file are read: the special tokens, do_lower_case, strip_accents,
  tokenize_chinese_chars and add_prefix_space. Where they do not say it, a vocab.txt
  without all of A-Z is lower-cased, and special tokens are known by their usual names.

  Raises:
    MissingInputError: there is no such file, or only half of a pair.
    DataError: it is something else.
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
    beside = Beside(file.parent)
    if isinstance(tree.get("model"), dict):  # a vocabulary may have the word "model"
      return FastTokenizer(keep_roles(content, tree, beside))
    return FastTokenizer(byte_level(path, file, tree, beside))
  if file.suffix == ".txt":
    return FastTokenizer(word_piece(file, content, Beside(file.parent)))
  try:
    return Tokenizer(content)
  except RuntimeError as error:
    raise errors.DataError(
      f"config.tokenizer.path={path} is not a SentencePiece model\n"
      f"  given:  {file.absolute()}, {len(content)} bytes\n"
      "  needed: a .model file of SentencePiece (not .vocab, not tiktoken's), a\n"
      "          tokenizer.json, a vocab.json with its merges.txt, or a vocab.txt"
    ) from error


def missing_tokenizer(path: object, file: pathlib.Path) -> errors.UserError:
  return errors.MissingInputError(
    f"config.tokenizer.path={path} does not exist\n  given:  {file.absolute()}\n"
    "  needed: a SentencePiece .model, a tokenizer.json, a vocab.json with its\n"
    "          merges.txt, a vocab.txt, or a directory that holds one of these\n"
    "  try:    --config.tokenizer.path=  (an empty path trains a tokenizer)"
  )


def choose_file(directory: pathlib.Path) -> pathlib.Path:
  """The file of a directory that is its tokenizer; see `load_tokenizer`."""
  models = [directory / MODEL, directory / "spiece.model"]
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
  """Whether a SentencePiece model has the pieces and special tokens of a JSON."""
  try:
    own = Tokenizer(model.read_bytes())
  except RuntimeError:  # tiktoken's files have this name too
    return False
  tree = read_json(whole)
  added = tree["added_tokens"] or []
  specials = {token["content"]: token["id"] for token in added if token["special"]}
  unknown = {own.piece(own.unk_id)} if own.unk_id >= 0 else set()
  pieces = read_vocabulary(tree) | {token["id"]: token["content"] for token in added}
  spaces = {i: piece.replace(" ", "\u2581") for i, piece in pieces.items()}
  return specials.keys() - unknown <= own.special_tokens.keys() and spaces == {
    i: own.piece(i) for i in range(own.vocab_size)
  }


def read_json(file: pathlib.Path) -> dict:
  try:
    tree = json.loads(file.read_bytes())
  except ValueError as error:
    raise unreadable(f"{file}: {error}") from error
  if not isinstance(tree, dict):
    raise unreadable(f"{file}: not an object")
  return tree


class Beside:
  """What the files beside a tokenizer say of it."""

  def __init__(self, directory: pathlib.Path):
    names = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
    trees = [
      read_json(directory / name) if (directory / name).is_file() else {}
      for name in names
    ]
    self.where = directory / "tokenizer_config.json"
    self.settings: dict = trees[0] | trees[1]
    self.chat_template = find_template(directory, self.settings)
    # Tokens by id, each with the options of the library.
    self.tokens: dict[int, dict] = {i: option(name) for name, i in trees[2].items()}
    for i, token in self.settings.get("added_tokens_decoder", {}).items():
      self.tokens[int(i)] = option(token)

  def names(self) -> dict[str, str | None]:
    """The special token of each role that is named, or None where there is none."""
    found = {
      role: self.settings.get(f"{role}_token", "") for role in (*SPECIAL_ROLES, "unk")
    }
    return {
      role: token["content"] if isinstance(token, dict) else token
      for role, token in found.items()
      if token != ""
    }

  def specials(self) -> list[dict]:
    """The special tokens that are named, with their options."""
    more = self.settings.get("additional_special_tokens") or []
    more = more if isinstance(more, list) else []
    named = [self.settings.get(f"{role}_token") for role in (*SPECIAL_ROLES, "unk")]
    return [option(token) | {"special": True} for token in (*named, *more) if token]


def find_template(directory: pathlib.Path, settings: dict) -> str:
  """The chat template beside a tokenizer, "" if there is none; of several the main."""
  file = directory / "chat_template.jinja"
  if file.is_file():
    return file.read_text("utf-8")
  found = settings.get("chat_template") or ""
  if isinstance(found, list):
    named = {entry["name"]: entry["template"] for entry in found}
    return named.get("default", "")
  return found


def option(token: dict | str) -> dict:
  """A token as `added_tokens` lists it, but for its id."""
  given = token if isinstance(token, dict) else {"content": token}
  flags = ("single_word", "lstrip", "rstrip", "normalized")
  flags = {flag: bool(given.get(flag, False)) for flag in flags}
  special = bool(given.get("special", False))
  return {"content": given["content"], **flags, "special": special}


def keep_roles(content: bytes, tree: dict, beside: Beside) -> bytes:
  """A tokenizer.json that also says which special tokens have which role."""
  if SPECIAL_IDS in tree["model"]:
    return content  # this was done before
  try:
    added = tree["added_tokens"] = tree.get("added_tokens") or []
    ids = {token["content"]: token["id"] for token in added}
    pieces = {piece: i for i, piece in read_vocabulary(tree).items()}
    specials = {token["content"] for token in added if token["special"]}
    roles = find_roles(beside, pieces | ids, specials)
  except (KeyError, TypeError, AttributeError) as error:
    raise unreadable(f"{type(error).__name__}: {error}") from error
  for name in {name for name, i in (pieces | ids).items() if i in roles.values()}:
    if name not in ids:
      added.append({"id": pieces[name], **option(name), "special": True})
  for token in added:
    token["special"] |= token["id"] in roles.values()
  tree["added_tokens"] = sorted(added, key=lambda token: token["id"])
  return write_tokenizer_json(tree, roles, beside.chat_template)


def find_roles(beside: Beside, ids: dict[str, int], specials: set) -> dict[str, int]:
  """The id of each role: as the files beside say, else by the usual names."""
  named = beside.names()
  roles = {}
  for role in SPECIAL_ROLES:
    if role not in named:
      known = [name for name in KNOWN[role] if name in specials]
      # Files that name some special tokens mean that there are no others for documents.
      if not known or (named and role in ("bos", "eos")):
        continue
      roles[role] = ids[known[0]]
    elif named[role] is not None:
      if named[role] not in ids:
        raise errors.DataError(
          f"a special token is not in the vocabulary\n  given:  {role}_token "
          f"{named[role]!r} in {beside.where}\n  needed: a token of the tokenizer"
        )
      roles[role] = ids[named[role]]
  return fill_roles(roles)


def write_tokenizer_json(
  tree: dict, roles: dict[str, int], chat_template: str
) -> bytes:
  tree = tree | {"truncation": None, "padding": None}
  tree["model"] = tree["model"] | {SPECIAL_IDS: roles}
  if chat_template:
    tree["model"][CHAT_TEMPLATE] = chat_template
  return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()


def assemble(vocab: dict[str, int], beside: Beside, parts: dict) -> bytes:
  """A tokenizer.json around the vocabulary of files that hold little else."""
  tokens = {token["content"]: token for token in beside.tokens.values()}
  tokens |= {t["content"]: t for t in beside.specials() if t["content"] not in tokens}
  for known in (*KNOWN.values(), ("[UNK]", "<unk>")):
    for name in known:
      if name in vocab and not beside.names() and name not in tokens:
        tokens[name] = option(name) | {"special": True}
  ids = vocab | {token["content"]: i for i, token in beside.tokens.items()}
  unknown = [name for name in tokens if name not in ids]
  if unknown:
    raise errors.DataError(
      f"special tokens are not in the vocabulary\n  given:  {unknown[:5]}, named in "
      f"{beside.where}\n  needed: tokens of the vocabulary, or of added_tokens.json"
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


def word_piece(file: pathlib.Path, content: bytes, beside: Beside) -> bytes:
  """The tokenizer.json of a vocab.txt, as BERT reads it (Devlin et al. 2018)."""
  try:
    lines = content.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
  except UnicodeDecodeError as error:
    raise unreadable(f"{file}: {error}") from error
  vocab = {line: i for i, line in enumerate(lines)}
  unknown = beside.names().get("unk") or "[UNK]"
  if unknown not in vocab:
    raise errors.DataError(
      f"config.tokenizer.path={file} is not a WordPiece vocabulary\n"
      f"  given:  {len(lines)} lines, none of them {unknown}\n"
      "  needed: a vocab.txt of BERT: a piece a line, special tokens too"
    )
  settings = beside.settings
  has_capitals = all(chr(letter) in vocab for letter in range(ord("A"), ord("Z") + 1))
  names = {"cls": "[CLS]", "sep": "[SEP]"} | beside.names()
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
  """The library's step that puts special tokens around one text, or around two."""

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
  path: object, file: pathlib.Path, vocab: dict[str, int], beside: Beside
) -> bytes:
  """The tokenizer.json of a vocab.json and its merges (Radford et al. 2019)."""
  merges = file.with_name(MERGES.get(file.name, "merges.txt"))
  if not merges.is_file():
    raise missing_tokenizer(path, merges)
  kind = str(beside.settings.get("tokenizer_class") or "").removesuffix("Fast")
  kind = kind.removesuffix("Tokenizer")
  is_qwen = kind == "Qwen2"
  if kind not in GPT2_LIKE and not is_qwen:
    raise errors.DataError(
      f"config.tokenizer.path={path} does not say how it parts words\n"
      f"  given:  {beside.settings['tokenizer_class']} without its tokenizer.json\n"
      "  needed: the tokenizer.json, which does"
    )
  lines = merges.read_text("utf-8").replace("\r\n", "\n").split("\n")
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
