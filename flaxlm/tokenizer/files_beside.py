"""Reads the files that lie beside a tokenizer and say more about it.

These are tokenizer_config.json, special_tokens_map.json, added_tokens.json and
chat_template.jinja. A token that any of them declares is a token: tokenizer.json and
SentencePiece models often lack the latest ones.
"""

import pathlib
import re
from collections.abc import Mapping

from flaxlm.errors import DataError
from flaxlm.json_files import read_json

MOST_IDS = 1 << 24  # of a tokenizer: the largest published ones have 2^20
# Those of transformers, in its order.
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_EXTRA_ID = re.compile("<extra_id_([0-9]+)>")  # T5 numbers them from the end
_NAMES = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")


class FilesBeside:
  """What the files beside a tokenizer say about it.

  Raises:
    DataError: one of them is damaged.
  """

  def __init__(self, directory: pathlib.Path):
    files = [directory / name for name in _NAMES]
    trees = [read_json(file) if file.is_file() else {} for file in files]
    self.where = directory / "tokenizer_config.json"
    self.settings: dict = trees[0] | trees[1]
    try:
      self.chat_template = find_template(directory, self.settings)
      # Added tokens by id, each with the library's options.
      self.tokens: dict[int, dict] = {i: added_token(t) for t, i in trees[2].items()}
      for i, token in self.settings.get("added_tokens_decoder", {}).items():
        self.tokens[int(i)] = added_token(token)
      wrong = [i for i in self.tokens if type(i) is not int or not 0 <= i < MOST_IDS]
      if wrong:
        raise ValueError(f"the id {wrong[0]!r}")
      self.more = [added_token(t) for tree in trees[:2] for t in _more_tokens(tree)]
      self.names()
      self.specials()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
      raise DataError(
        f"the tokenizer files in {directory} cannot be used",
        f"{type(error).__name__}: {error}"[:200],
        f"{', '.join(_NAMES)} as transformers writes them",
      ) from error

  def names(self) -> dict[str, str | None]:
    """Returns the named special token of each role; None means that there is none."""
    found = {role: self.settings.get(f"{role}_token", "") for role in _ROLES}
    return {
      role: token["content"] if isinstance(token, dict) else token
      for role, token in found.items()
      if token != ""
    }

  def specials(self) -> list[dict]:
    """Returns the special tokens that are named, with their options."""
    named = [self.settings.get(f"{role}_token") for role in _ROLES]
    tokens = [added_token(token) for token in named if token]
    return [token | {"special": True} for token in (*tokens, *self.more)]

  def declared(self, ids: Mapping[str, int]) -> list[dict]:
    """Returns the tokens that these files declare, each with its "id", by id.

    Names without a number follow the vocabulary, as in transformers.

    Args:
      ids: those of the tokenizer, by name.
    """
    found = {t["content"]: t | {"id": i} for i, t in self.tokens.items()}
    new: dict[str, dict] = {}
    for token in self.specials():
      name = token["content"]
      if name in found:
        found[name]["special"] = True
      elif name not in ids:
        new.setdefault(name, token)
      elif name != self.names().get("unk"):
        found[name] = token | {"id": ids[name]}
    if all(map(_EXTRA_ID.fullmatch, new)):
      new = dict(sorted(new.items(), key=lambda t: -int(_EXTRA_ID.fullmatch(t[0])[1])))
    free = 1 + max([*ids.values(), *self.tokens], default=-1)
    tokens = [
      *found.values(),
      *(t | {"id": free + i} for i, t in enumerate(new.values())),
    ]
    return sorted(tokens, key=lambda token: token["id"])


def _more_tokens(tree: dict) -> list:
  """Returns the special tokens without a role, under their old name and the new one."""
  found = []
  for key in ("additional_special_tokens", "extra_special_tokens"):
    tokens = tree.get(key) or []
    found += tokens.values() if isinstance(tokens, dict) else tokens
  return found


def find_template(directory: pathlib.Path, settings: dict) -> str:
  """Returns the chat template beside a tokenizer, or ""; of several, the default."""
  file = directory / "chat_template.jinja"
  if file.is_file():
    return file.read_text("utf-8")
  found = settings.get("chat_template") or ""
  if isinstance(found, list):
    named = [entry for entry in found if isinstance(entry, dict)]
    default = [entry for entry in named if entry.get("name") == "default"]
    found = default[-1].get("template") if default else "" if named else found
  if not isinstance(found, str):
    where, needed = f"{directory}: chat_template", "a text, or several by name"
    raise DataError(f"{where} cannot be used", found, needed)
  return found


def added_token(token: dict | str) -> dict:
  """Returns a token as `added_tokens` of a tokenizer.json lists it, without its id."""
  given = token if isinstance(token, dict) else {"content": token}
  flags = ("single_word", "lstrip", "rstrip", "normalized")
  flags = {flag: bool(given.get(flag, False)) for flag in flags}
  special, content = bool(given.get("special", False)), given["content"]
  if not isinstance(content, str) or not content:
    raise ValueError(f"the token {content!r}")
  return {"content": content, **flags, "special": special}
