"""Which tokens end what a model writes. Several files of a model say so."""

import contextlib
import json
import pathlib

from flaxlm.errors import DataError
from flaxlm.inference.text import end_of_turn
from flaxlm.json_files import read_json
from flaxlm.tokenizer.chat_template import ChatTemplate
from flaxlm.tokenizer.files import AnyTokenizer

GENERATION_FILE = "generation_config.json"


def find_end_ids(
  directory: pathlib.Path | None,
  tokenizer: AnyTokenizer | None,
  template: ChatTemplate | None,
) -> tuple[int, ...]:
  """Returns all tokens that end a text besides the tokenizer's own, in this order.

  Those that generation_config.json and config.json in `directory` list, and the one
  that ends the assistant's turn in `template`.

  Raises:
    DataError: a file lists what is no id.
  """
  found = []
  for name in (GENERATION_FILE, "config.json"):
    if directory is not None and (directory / name).is_file():
      ids = read_json(directory / name).get("eos_token_id")
      ids = ids if isinstance(ids, list) else [ids] * (ids is not None)
      if not all(type(i) is int for i in ids):
        what = f"{directory / name}: eos_token_id cannot be used"
        raise DataError(what, f"{ids!r:.60}", "ids of tokens: whole numbers")
      found += ids
  if tokenizer and template:
    # A template that does not take a plain conversation has no such token.
    with contextlib.suppress(DataError):
      found += end_of_turn(tokenizer, template)[0]
  return tuple(dict.fromkeys(i for i in found if i >= 0))  # -1 is none


def generation_config(
  originals: pathlib.Path | None, like: dict[str, object], end_ids: tuple[int, ...]
) -> bytes:
  """Returns generation_config.json: the original's, with all end tokens of the run.

  Args:
    like: what to write if there is no original.
  """
  file = originals / GENERATION_FILE if originals else None
  tree = read_json(file) if file and file.is_file() else dict(like)
  listed = tree.get("eos_token_id")
  listed = listed if isinstance(listed, list) else [listed]
  if file and file.is_file() and set(end_ids) <= set(listed):
    return file.read_bytes()
  ids = dict.fromkeys(i for i in (*listed, *end_ids) if type(i) is int)
  if ids:
    tree["eos_token_id"] = list(ids) if len(ids) > 1 else next(iter(ids))
  return (json.dumps(tree, indent=2) + "\n").encode()
