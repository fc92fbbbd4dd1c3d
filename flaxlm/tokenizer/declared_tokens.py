"""Writes into a SentencePiece model what the files beside it declare.

A store or a run keeps a tokenizer as one file, so tokens of other files become pieces
of the model: special ones are control symbols, which no text can name, the others are
user-defined symbols, which match in text. Ids stay as declared. Whether a text begins
with bos is a field of our own at the end of the file, which SentencePiece skips.
"""

from flaxlm.errors import DataError
from flaxlm.tokenizer.files_beside import FilesBeside

# Field 2000 of the message, a number: 0.
NO_BOS = b"\x80\x7d\x00"
_MOST_GAPS = 1 << 16
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of pieces


def declare(model: bytes, beside: FilesBeside, adds_bos: bool) -> bytes:
  """Returns a SentencePiece model with the tokens and roles of the files beside it.

  Args:
    adds_bos: the tokenizer begins every text with bos.
  Raises:
    DataError: the files contradict each other.
  """
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(model.removesuffix(NO_BOS))
  before = proto.SerializeToString()
  ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  for token in beside.declared(ids):
    _declare_token(proto, ids, token, beside)
  for role in ("bos", "eos", "pad"):
    name = beside.names().get(role, "")
    if name == "":
      continue
    # A name that no piece has means that there is none.
    _set_role(proto.trainer_spec, role, "<no such piece>" if name is None else name)
  after = proto.SerializeToString()
  return (model if before == after else after).removesuffix(NO_BOS) + (
    b"" if adds_bos else NO_BOS
  )


def _declare_token(proto, ids: dict[str, int], token: dict, beside) -> None:
  """Makes one token a piece of the model."""
  name, i = token["content"], token["id"]
  if name not in ids and len(proto.pieces) <= i < len(proto.pieces) + _MOST_GAPS:
    while len(proto.pieces) < i:
      gap = f"<no token {len(proto.pieces)}>"
      proto.pieces.add(piece=gap, score=0.0, type=_CONTROL)
    ids[name] = i
    proto.pieces.add(piece=name, score=0.0, type=_NORMAL)
  if ids.get(name) != i:
    own = proto.pieces[i].piece if i < len(proto.pieces) else "nothing"
    raise DataError(
      "the files of a tokenizer contradict each other",
      f"id {i} is {name!r} beside the model, {own!r} in it ({beside.where})",
      "files of one tokenizer",
      "use its tokenizer.json, if there is one",
    )
  piece = proto.pieces[i]
  if token["special"] and piece.type in (_NORMAL, _USER_DEFINED):
    piece.type = _CONTROL
  elif piece.type == _NORMAL:
    piece.type = _USER_DEFINED


def _set_role(spec, role: str, name: str) -> None:
  key, usual = f"{role}_piece", {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}[role]
  if (getattr(spec, key) or usual) != name:
    setattr(spec, key, name)
