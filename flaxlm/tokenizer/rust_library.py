"""Runs the `tokenizers` library on files that may be damaged, or made to do harm.

What the library does not bound is bounded before a file is used: ids, how much longer
its steps make a text, and the time that its regular expressions take. These are tried
on runs of the characters that they name, of growing length: the time of a pattern that
backtracks grows with a power of the length, or doubles with each character. The
library's own failures (Rust's panics) are errors of the file.
"""

import contextlib
import functools
import json
import time
from collections.abc import Iterator

from flaxlm import errors
from flaxlm.json_files import parse_json
from flaxlm.machine import quiet_stderr
from flaxlm.tokenizer.files_beside import MOST_IDS

_LONGEST_RUN = 2048  # characters
_SECONDS = 0.2  # of CPU time for one run: a linear pattern takes about a millisecond
_USUAL = "aA1 \n\t'-.\u00e9\u4e2d"  # what patterns speak of by classes
_MOST_LITERALS = 24
_MOST_GROWTH = 4096  # characters that replacements may make of one
# Randomness that models use in training.
_SAMPLING = ("dropout", "alpha", "nbest_size")


def import_tokenizers():
  """Imports the `tokenizers` library; ConfigError if it is not installed."""
  try:
    import tokenizers
  except ImportError as error:
    raise errors.ConfigError(
      "config.tokenizer.path", "a tokenizer of the `tokenizers` library, not installed",
      "that library, or a SentencePiece .model", "pip install tokenizers",
    ) from error  # fmt: skip
  return tokenizers


def unreadable(why: str) -> errors.DataError:
  """Returns the error for a tokenizer.json that cannot be used."""
  return errors.DataError(
    "a tokenizer.json cannot be used",
    " ".join(why.split())[:200],
    "a file of the Hugging Face tokenizers library",
    "pip install -U tokenizers, or save it again with transformers",
  )


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
  """Turns exceptions of the library, and of our reading of a file, into DataError."""
  try:
    yield
  except (errors.UserError, MemoryError):
    raise
  except Exception as error:  # the library raises nothing more specific
    kind = "" if type(error) is Exception else f"{type(error).__name__}: "
    raise unreadable(f"{kind}{error}") from error
  except BaseException as error:
    if type(error).__name__ != "PanicException":
      raise
    raise unreadable(f"the library fails: {error}") from error


def read_tokenizer_json(model: bytes) -> dict:
  """Returns the tree of a tokenizer.json, without randomness and within limits.

  Raises:
    DataError: it is no such file, or it would take too much time or memory.
  """
  tree = parse_json(model, "a tokenizer.json", {"model": dict})
  steps = {key: tree.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
  with quiet_stderr(), library_errors():
    tree["model"] = {k: v for k, v in tree["model"].items() if k not in _SAMPLING}
    _check_ids(tree)
    patterns, growth = set(), 1
    for step in _objects(steps):
      if isinstance(regex := step.get("Regex"), str):
        patterns.add(regex)
      for key in ("content", "prepend"):
        if isinstance(text := step.get(key), str):
          growth *= max(1, len(text))
    if growth > _MOST_GROWTH:
      raise unreadable(f"its steps may make {growth:,} characters of one")
    for pattern in sorted(patterns):
      if why := find_backtracking(pattern):
        raise unreadable(f"the pattern {pattern[:60]!r} {why}")
  return tree


def _check_ids(tree: dict) -> None:
  """Raises DataError unless all ids are numbers of a bounded vocabulary."""
  vocab = tree["model"]["vocab"]
  ids = [] if isinstance(vocab, list) else list(vocab.values())
  ids += [token["id"] for token in tree.get("added_tokens") or []]
  wrong = [i for i in ids if type(i) is not int or not 0 <= i < MOST_IDS]
  if wrong or len(vocab) > MOST_IDS:
    raise unreadable(f"the id {wrong[0] if wrong else len(vocab)!r}")


def _objects(value: object) -> Iterator[dict]:
  """Yields all objects in a JSON value, whose depth is bounded."""
  if isinstance(value, dict):
    yield value
    value = list(value.values())
  if isinstance(value, list):
    for item in value:
      yield from _objects(item)


@functools.cache
def find_backtracking(pattern: str) -> str:
  """Returns why a regular expression takes too long; "" if it does not."""
  library = import_tokenizers()
  split = library.pre_tokenizers.Split(library.Regex(pattern), "isolated")
  literals = "".join(dict.fromkeys(c for c in pattern if c.isalnum()))
  literals = literals[:_MOST_LITERALS]
  units = [*dict.fromkeys(_USUAL + literals), *filter(None, (literals, literals[:2]))]
  for unit in units:
    size = 16
    while size <= _LONGEST_RUN:
      run = (unit * size)[:size]
      for text in (run, run + "\0"):
        start = time.thread_time()
        try:
          split.pre_tokenize_str(text)
        except BaseException as error:
          if type(error).__name__ != "PanicException":
            raise
          return f"fails on {size} characters like {unit[:3]!r}: {error}"
        if (seconds := time.thread_time() - start) > _SECONDS:
          return f"takes {seconds:.1f} s on {size} characters like {unit[:3]!r}"
      size *= 2
  return ""


def to_library(tree: dict):
  """Returns the library's tokenizer of a tree."""
  with quiet_stderr(), library_errors():
    return import_tokenizers().Tokenizer.from_str(json.dumps(tree))
