"""Writes the tokenizer files of an exported model: a tokenizer.json for any tokenizer.

A SentencePiece model is converted to a tokenizer.json with the same ids. If it has no
dummy prefix, like those trained here, spaces stay spaces: U+2581 in text is then not
taken for a space, and decoding loses nothing. If it has one, its pieces keep U+2581 for
a space, and one is put before every text, as SentencePiece does.
"""

import base64
import json

from flaxlm import errors
from flaxlm.tokenizer.fast import SPECIAL_ROLES
from flaxlm.tokenizer.files import (
  AnyTokenizer,
  file_name,
  is_json,
  open_tokenizer,
  special_token_step,
  write_tokenizer_json,
)
from flaxlm.tokenizer.pieces import SPACE_MARK
from flaxlm.tokenizer.sentencepiece import Tokenizer

UNIGRAM, BPE, CHAR = 1, 2, 4  # model_type of sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of its pieces


def export_files(
  model: bytes, max_len: int, chat_template: str = "", is_encoder: bool = False
) -> dict[str, bytes]:
  """Returns the tokenizer files that `transformers` loads with a model, by name.

  Args:
    model: the bytes of the tokenizer, as a store or a run keeps them.
    max_len: tokens of the longest text that the model can read.
    chat_template: Jinja source; "" means the tokenizer's own, if any.
    is_encoder: texts become [bos] text [eos], else [bos] text, to be continued.
  """
  config = tokenizer_config(open_tokenizer(model), max_len, chat_template)
  files = {
    "tokenizer.json": to_tokenizer_json(model, is_encoder),
    "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
  }
  return files | {file_name(model): model}


def tokenizer_config(
  tokenizer: AnyTokenizer, max_len: int, chat_template: str = ""
) -> dict:
  """Returns the contents of tokenizer_config.json."""
  names = {i: name for name, i in tokenizer.special_tokens.items()}
  ids = {
    "bos": tokenizer.bos_id,
    "eos": tokenizer.eos_id,
    "pad": tokenizer.pad_id,
    "cls": tokenizer.cls_id,
    "sep": tokenizer.sep_id,
    "mask": tokenizer.mask_id,
  }
  assert ids.keys() == set(SPECIAL_ROLES)
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": max_len,
    "clean_up_tokenization_spaces": False,
  }
  # transformers gives BERT's tokens the roles cls and sep alone.
  hidden = {"bos"} if ids["bos"] == ids["cls"] else set()
  hidden |= {"eos"} if ids["eos"] == ids["sep"] else set()
  for role, i in ids.items():
    if i in names and role not in hidden:
      config[f"{role}_token"] = names[i]
  if tokenizer.unk_id >= 0:
    config["unk_token"] = tokenizer.piece(tokenizer.unk_id)
  source = chat_template or tokenizer.chat_template
  return config | ({"chat_template": source} if source else {})


def to_tokenizer_json(model: bytes, is_encoder: bool = False) -> bytes:
  """Converts a SentencePiece model to a tokenizer.json with the same ids.

  BPE and character models give equal ids for every text. Unigram models may split a run
  of spaces differently: rounding decides between equally probable splits, and the
  library rounds differently. A tokenizer.json is returned as it is.

  Raises:
    DataError: the library has no such kind of model, or would read some text otherwise.
  """
  if is_json(model):
    return model
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  own = Tokenizer(model)
  check_convertible(model)
  marks = own.adds_prefix  # pieces keep U+2581 for a space
  space = SPACE_MARK if marks else " "
  pieces = [p.piece.replace(SPACE_MARK, space) for p in proto.pieces]
  extracted = (UNKNOWN, CONTROL) + (() if own.adds_prefix else (USER_DEFINED,))
  added = [
    {
      "id": i,
      "content": pieces[i],
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": False,
      "special": piece.type != USER_DEFINED,
    }
    for i, piece in enumerate(proto.pieces)
    if piece.type in extracted
  ]
  roles = {
    "bos": own.bos_id,
    "eos": own.eos_id,
    "pad": own.pad_id,
    "cls": own.cls_id,
    "sep": own.sep_id,
    "mask": own.mask_id,
  }
  bos = {pieces[i]: i for i in own.begin_ids}
  eos = {pieces[own.eos_id]: own.eos_id} if own.eos_id >= 0 and is_encoder else {}
  to_space = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
  decoders = [to_space] * marks + [{"type": "ByteFallback"}, {"type": "Fuse"}]
  if own.adds_prefix:
    decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
  tree = {
    "version": "1.0",
    "added_tokens": added,
    "normalizer": normalizer(proto.normalizer_spec, marks),
    "pre_tokenizer": None,
    "post_processor": special_token_step(bos, eos) if bos or eos else None,
    "decoder": {"type": "Sequence", "decoders": decoders},
    "model": convert_model(proto, pieces, own),
  }
  roles = {role: i for role, i in roles.items() if i >= 0}
  return write_tokenizer_json(tree, roles, "")


def check_convertible(model: bytes) -> None:
  """Raises DataError if the `tokenizers` library cannot do what this model does."""
  if problem := find_inconvertible(model):
    raise errors.DataError(
      "the tokenizer cannot be written as a tokenizer.json",
      problem,
      "a bpe, unigram or char model without it",
      "keep tokenizer.model beside the exported weights",
    )


def find_inconvertible(model: bytes) -> str:
  """Returns what the `tokenizers` library cannot do as this tokenizer does, or ""."""
  if is_json(model):
    return ""
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  kind, spec = proto.trainer_spec.model_type, proto.normalizer_spec
  problem = ""
  if kind not in (UNIGRAM, BPE, CHAR):
    problem = f"a model of type {kind}"
  elif proto.trainer_spec.treat_whitespace_as_suffix:
    problem = "a model with spaces at the ends of its pieces"
  elif not spec.escape_whitespaces:
    problem = "a model that drops spaces"
  elif spec.add_dummy_prefix or spec.remove_extra_whitespaces:
    # The library splits text at such symbols first: each part would get a prefix.
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    long = next((symbol for symbol in symbols if len(symbol) > 1), "")
    problem = f"the user symbol {long!r}, with a dummy prefix" if long else ""
  return problem


def normalizer(spec, marks: bool) -> dict | None:
  """Returns what SentencePiece does to a text before it splits it, in that order."""
  steps = []
  if spec.precompiled_charsmap:
    charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
    steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
  if spec.remove_extra_whitespaces:
    for pattern, content in ((rf"\A +|[ {SPACE_MARK}]+\z", ""), (" {2,}", " ")):
      replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
      steps.append(replace)
  if spec.add_dummy_prefix:
    steps.append({"type": "Prepend", "prepend": SPACE_MARK})
  if marks:
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK})
  return {"type": "Sequence", "normalizers": steps} if steps else None


def convert_model(proto, pieces: list[str], own: Tokenizer) -> dict:
  """Returns the "model" of tokenizer.json."""
  byte_fallback = proto.trainer_spec.byte_fallback
  if proto.trainer_spec.model_type == UNIGRAM:
    normal = [p.score for p in proto.pieces if p.type == NORMAL]
    # Control symbols and bytes must not match text: they cost more than any other way
    # to spell their names. User symbols win over everything else.
    lowest, highest = min(normal) - 1e6, max(0.0, max(normal))
    scores = {NORMAL: None, USER_DEFINED: highest}
    return {
      "type": "Unigram",
      "unk_id": own.unk_id,
      "byte_fallback": byte_fallback,
      "vocab": [
        [piece, p.score if p.type == NORMAL else scores.get(p.type, lowest)]
        for piece, p in zip(pieces, proto.pieces, strict=True)
      ],
    }
  return {
    "type": "BPE",
    "dropout": None,
    "unk_token": pieces[own.unk_id],
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": byte_fallback,
    "ignore_merges": False,
    "vocab": {piece: i for i, piece in enumerate(pieces)},
    "merges": make_merges(proto, pieces),
  }


def make_merges(proto, pieces: list[str]) -> list[list[str]]:
  """Returns every pair of pieces that joins to a third, the best third piece first.

  SentencePiece joins the pair whose piece has the highest score; the library joins the
  pair that comes first.
  """
  if proto.trainer_spec.model_type == CHAR:
    return []
  normal = {
    piece: p.score
    for piece, p in zip(pieces, proto.pieces, strict=True)
    if p.type == NORMAL
  }
  pairs = [
    (-score, piece[:i], piece[i:])
    for piece, score in normal.items()
    for i in range(1, len(piece))
    if piece[:i] in normal and piece[i:] in normal
  ]
  pairs.sort(key=lambda pair: pair[0])
  return [[left, right] for _, left, right in pairs]
