"""Loads the tokenizer of a store, or trains it on a sample of the sources."""

import pathlib
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from flaxlm import errors, files
from flaxlm.data.text.documents import Corpus
from flaxlm.tokenizer.files import (
  AnyTokenizer,
  file_name,
  find_tokenizer,
  load_tokenizer,
)
from flaxlm.tokenizer.sentencepiece import Tokenizer, sample_lines, train_tokenizer


def make_tokenizer(
  root: pathlib.Path,
  knobs: ConfigDict,
  sources: ConfigDict,
  corpora: dict[str, Corpus],
  log: Callable[[str], None],
) -> AnyTokenizer:
  """Returns the tokenizer of the store at `root`, and writes it there if it is new.

  Args:
    knobs: config.tokenizer.
    sources: config.data.sources, opened as `corpora`.

  Raises:
    ConfigError: these settings cannot be trained, or the tokenizer lacks a symbol.
  """
  if path := find_tokenizer(root):
    return load_tokenizer(path)
  if knobs.path:
    tokenizer = load_tokenizer(knobs.path)
  else:
    log(f"training a {knobs.kind} tokenizer of {knobs.vocab_size} pieces")
    texts = sample_texts(sources, corpora, 50 * knobs.train_bytes)
    lines = sample_lines(texts, knobs.train_bytes)
    model = train_tokenizer(
      lines, knobs.kind, knobs.vocab_size, knobs.byte_fallback, knobs.user_symbols
    )
    tokenizer = Tokenizer(model)
  for symbol in knobs.user_symbols:
    if tokenizer.control_id(symbol) < 0:
      needed = f"control symbols that {knobs.path} has"
      raise errors.ConfigError("config.tokenizer.user_symbols", symbol, needed, "()")
  if max(tokenizer.bos_id, tokenizer.eos_id) < 0:
    raise errors.ConfigError(
      "config.tokenizer.path",
      knobs.path,
      "a model with a bos or eos to separate documents",
    )
  files.write_atomically(root / file_name(tokenizer.model), tokenizer.model)
  return tokenizer


def sample_texts(
  sources: ConfigDict, corpora: dict[str, Corpus], most: int
) -> Iterator[str]:
  """Yields the text to train a tokenizer on, from all files or from every n-th file.

  Only about `most` bytes per source are read: more text would hardly change the
  vocabulary, and would cost a pass over the disk.
  """
  for name, corpus in corpora.items():
    step = max(1, sum(corpus.sizes) // most)
    left = sources[name].max_documents or float("inf")
    for number in range(0, len(corpus.files), step):
      size = 0
      for piece in corpus.read((number, 0)):
        if piece.position[0] != number or size > most or left <= 0:
          break
        size += len(piece.text)
        left -= piece.end
        yield piece.text
