"""Opens text files, local or remote, plain or compressed, and cleans their text.

Bad text is repaired, not refused: one bad character should not stop a corpus. Each
repair yields a problem, a string that is counted while a store is prepared.
"""

import bz2
import codecs
import contextlib
import glob
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

from flaxlm import errors
from flaxlm.data.text import remote
from flaxlm.machine import quiet_stderr

READ_BYTES = 1 << 20  # bytes read at a time
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # from damaged files
SURROGATES = re.compile("[\ud800-\udfff]")
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstd"}
# Problems.
BAD_UTF8 = "invalid UTF-8, replaced"
BAD_SURROGATE = "lone surrogate, replaced"
BAD_JSON = "no text in the record, skipped"
NUL, BOM, EMPTY = "NUL character, kept", "byte order mark, dropped", "empty, skipped"
# What a reader yields: (text, whether it ends its document, problems). A document may
# come in any number of parts.
DocumentParts = Iterable[tuple[str, bool, tuple[str, ...]]]


def find_files(key: str, pattern: str) -> list[str]:
  """Returns the files that match a glob, sorted.

  Raises:
    MissingInputError: no file matches; it names the config key `key`.
  """
  if remote.is_remote(pattern):
    fixed = re.match(r"[a-z0-9]+://[^*?\[]*(?=/|$)", pattern)[0]
    rest = pattern[len(fixed) :].strip("/")
    with quiet_stderr(), remote.reaching(pattern):
      root = remote.path(fixed)
      matches = root.glob(rest) if rest else [root]
      files = [str(path) for path in matches if path.exists() and not path.is_dir()]
  else:
    pattern = os.path.expanduser(pattern)
    files = [f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f)]
  if not files:
    folder = not remote.is_remote(pattern) and os.path.isdir(pattern)
    raise errors.MissingInputError(
      f"{key} matches nothing",
      f"{pattern} ({os.getcwd()})",
      "a glob that matches files",
      f"{pattern.rstrip('/')}/**/*.txt" if folder else "check path and quotes",
    )
  return sorted(files)


def file_size(path: str) -> int:
  """Returns the size of a file in bytes."""
  if remote.is_remote(path):
    with remote.reaching(path):
      return remote.path(path).stat().length
  return os.path.getsize(path)


def open_binary(path: str) -> IO[bytes]:
  """Opens a local or remote file for reading, without decompressing it."""
  if remote.is_remote(path):
    with remote.reaching(path):
      return remote.path(path).open("rb")
  return open(path, "rb")


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[IO[bytes]]:
  """Opens a file and decompresses it as its first bytes, not its name, say."""
  with open_binary(path) as file:
    start = file.read(6)
    file.seek(0)
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), "")
    if kind == "zstd":
      import pyarrow

      stream = pyarrow.CompressedInputStream(file, "zstd")
      yield io.BufferedReader(stream, READ_BYTES)
    elif kind:
      with {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}[kind](file) as stream:
        yield stream
    else:
      yield file


def damaged_file(path: str, error: Exception, needed: str) -> errors.DataError:
  """Returns the error for a file whose reading failed with `error`."""
  given = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
  return errors.DataError(f"{path} cannot be read to its end", given, needed)


def text_chunks(path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Yields chunks of (text, problems) of a UTF-8 file, about a megabyte each."""
  decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
  first = True
  try:
    with open_stream(path) as stream:
      while True:
        chunk = stream.read(READ_BYTES)
        text = decode(chunk, not chunk)
        problems = ()
        if first and text:
          first = False
          if text[0] == "\ufeff":
            text, problems = text[1:], (BOM,)
        if text:
          text, found = clean(text, BAD_UTF8)
          yield text, problems + found
        if not chunk:
          return
  except READ_ERRORS as error:
    needed = "a whole text file (plain, gz, bz2, xz, zst)"
    raise damaged_file(path, error, needed) from error


def clean(text: str, problem: str) -> tuple[str, tuple[str, ...]]:
  """Replaces surrogates, which UTF-8 cannot encode; returns (text, problems).

  Args:
    problem: the problem to note for them: BAD_UTF8 or BAD_SURROGATE.
  """
  problems = (NUL,) if "\0" in text else ()
  try:
    text.encode()
  except UnicodeEncodeError:
    return SURROGATES.sub("\ufffd", text), (*problems, problem)
  return text, problems


def lines(chunks: Iterable) -> DocumentParts:
  """Splits (text, problems) chunks into lines, without their newlines."""
  open_line = False
  for text, problems in chunks:
    *whole, rest = text.split("\n")
    for line in whole:
      yield line, True, problems
      problems, open_line = (), False
    if rest:
      yield rest, False, problems
      open_line = True
  if open_line:
    yield "", True, ()
