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
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from flaxlm import errors
from flaxlm.data.text import remote
from flaxlm.data.text.contents import unreadable_source
from flaxlm.machine import quiet_stderr

READ_BYTES = 1 << 20  # bytes read at a time
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # from damaged files
SURROGATES = re.compile("[\ud800-\udfff]")
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstd"}
# A zstd file may begin with a frame to skip, as pzstd's do (RFC 8878, section 3.1.2).
MAGIC |= {bytes([0x50 + n, 0x2A, 0x4D, 0x18]): "zstd" for n in range(16)}
UNICODE_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
  codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
  codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
# No text begins like these. Other formats show by how few of their bytes are text.
ARRAY_RECORD = b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f"
NO_TEXT = {
  b"PK\x03\x04": "a zip archive", b"PK\x05\x06": "a zip archive",
  b"7z\xbc\xaf": "a 7z archive", b"Rar!\x1a\x07": "a rar archive",
  b"\x04\x22\x4d\x18": "compressed by lz4", b"\x1f\x9d": "compressed by compress",
  b"\xff\x06\0\0sNaPpY": "compressed by snappy", b"LZIP\x01": "compressed by lzip",
  ARRAY_RECORD: "an array_record file", b"Obj\x01": "Avro", b"PAR1\x15": "parquet",
  b"ARROW1\0": "Arrow", b"SQLite format 3\0": "SQLite", b"\x89HDF": "HDF5",
  b"\x93NUMPY": "a numpy array", b"\xd0\xcf\x11\xe0": "an old Office document",
  b"\x7fELF": "a program", b"\x89PNG": "an image", b"\xff\xd8\xff": "an image",
}  # fmt: skip
TFRECORD_HEADER = struct.Struct("<QI")  # length of the data, checksum of these 8 bytes
TAR_MARK = 257, b"ustar"  # where a tar archive says what it is
# Problems.
BAD_UTF8 = "invalid UTF-8, replaced"
BAD_SURROGATE = "lone surrogate, replaced"
BAD_JSON = "no text in the record, skipped"
NUL, BOM, EMPTY = "NUL character, kept", "byte order mark, dropped", "empty, skipped"
CORRUPT = "damaged, lost"
# What a reader yields: (text, whether it ends its document, problems). A document may
# come in any number of parts.
DocumentParts = Iterable[tuple[str, bool, tuple[str, ...]]]


class DamagedFile(errors.DataError):
  """A file, or the rest of it, is lost; config.data.on_corrupt says whether it may be.

  Its fields, encodings and settings are right, as far as anyone can tell.
  """


def find_files(key: str, pattern: str) -> list[str]:
  """Returns the files that match a glob, sorted.

  Raises:
    MissingInputError: no file matches; it names the config key `key`.
  """
  if remote.is_remote(pattern):
    files = _remote_files(pattern)
  else:
    pattern = os.path.expanduser(pattern)
    files = local_files(pattern)
  if not files:
    raise errors.MissingInputError(
      f"{key} matches nothing",
      f"{pattern} ({os.getcwd()})",
      "a glob that matches files",
      _hint(pattern),
    )
  return sorted(files)


def _remote_files(pattern: str) -> list[str]:
  """Returns the remote files that match a glob, or the one that has this name."""
  fixed = re.match(r"[a-z0-9]+://[^*?\[]*(?=/|$)", pattern)[0]
  rest = pattern[len(fixed) :].strip("/")
  with quiet_stderr(), remote.reaching(pattern):
    root, named = remote.path(fixed), remote.path(pattern)
    literal = not rest or ("[" in rest and named.exists())
    matches = [named] if literal else root.glob(rest)
    return [str(path) for path in matches if path.exists() and not path.is_dir()]


def _hint(pattern: str) -> str:
  """Returns what to try instead of a pattern that matches nothing."""
  if remote.is_remote(pattern):
    return "check path and quotes"
  if os.path.isdir(pattern):
    return f"{pattern.rstrip('/')}/**/*.txt"
  literal = pattern.replace("[", "[[]")
  if literal != pattern and local_files(literal):
    return f"{literal} if the brackets are in the names: [abc] is one of these letters"
  return "check path and quotes"


def local_files(pattern: str) -> list[str]:
  """Returns the local files that match a glob, each once, however many names it has.

  What exists by its literal name is taken literally, brackets and all.
  """
  head, tail = pattern, ""
  while head and not os.path.exists(head):
    head, _, last = head.rstrip("/").rpartition("/")
    tail = f"/{last}{tail}"
  pattern = glob.escape(head) + (tail if head or pattern.startswith("/") else tail[1:])
  found = {}
  # Of the names of a file, one without links comes first.
  matches = sorted(_expand(pattern))
  matches.sort(key=lambda path: os.path.realpath(path) != os.path.abspath(path))
  for path in matches:
    if os.path.isfile(path):
      status = os.stat(path)
      found.setdefault((status.st_dev, status.st_ino), path)
  return list(found.values())


def _expand(pattern: str) -> Iterator[str]:
  """Yields the paths that match a glob; `**` enters each directory once, links too."""
  stars = re.search(r"(?:^|(?<=/))\*\*(?=/|$)", pattern)
  if not stars:
    yield from glob.iglob(pattern)
    return
  before, after = pattern[: stars.start()], pattern[stars.end() :].lstrip("/") or "*"
  entered = set()
  for root in glob.glob(before) if before else [""]:
    for folder, folders, _ in os.walk(root or ".", followlinks=True):
      status = os.stat(folder)
      folders[:] = sorted(name for name in folders if not name.startswith("."))
      if (status.st_dev, status.st_ino) in entered:
        folders.clear()
        continue
      entered.add((status.st_dev, status.st_ino))
      inside = folder if root else os.path.relpath(folder)
      inside = "" if inside == "." else inside
      yield from _expand(os.path.join(glob.escape(inside), after))


def open_binary(path: str) -> IO[bytes]:
  """Opens a local or remote file for reading, without decompressing it."""
  if remote.is_remote(path):
    with remote.reaching(path):
      return io.BufferedReader(_Remote(path, remote.path(path).open("rb")), READ_BYTES)
  return open(path, "rb")


class _Remote(io.RawIOBase):
  """A remote file, whose reading ends in a StorageError if the network fails.

  Libraries raise what they like; nothing of it may pass for damage of the file.
  """

  def __init__(self, address: str, file: IO[bytes]):
    self._address, self._file = address, file

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    with remote.reaching(self._address):
      data = self._file.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    with remote.reaching(self._address):
      self._file.seek(offset, whence)
      return self._file.tell()

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


class _Recoded(io.RawIOBase):
  """A stream of text in UTF-16 or UTF-32, read as UTF-8.

  What the encoding does not allow becomes a byte that is no UTF-8, so that it is noted
  or refused as in any other file.
  """

  def __init__(self, stream: IO[bytes], encoding: str):
    codecs.register_error("flaxlm.bad_byte", lambda error: ("\udcff", error.end))
    self._text = io.TextIOWrapper(stream, encoding, "flaxlm.bad_byte", newline="")
    self._rest = b""

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    if not self._rest:
      self._rest = self._text.read(READ_BYTES).encode(errors="surrogateescape")
    size = min(len(buffer), len(self._rest))
    buffer[:size], self._rest = self._rest[:size], self._rest[size:]
    return size


class _Streams(io.RawIOBase):
  """The contents of a bz2 or xz file, which may be several streams, one after another.

  The library's reader ends in silence where a later stream is damaged; this one fails.
  """

  def __init__(self, file: IO[bytes], make: Callable):
    self._file, self._make = file, make
    self._stream, self._unread = None, b""  # no stream is open; bytes of the file

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while True:
      if self._stream is None:
        unread = self._unread or self._file.read(READ_BYTES)
        if not unread:
          return 0
        self._unread = unread.lstrip(b"\0")  # zeros may fill up a file of xz
        if not self._unread:
          continue
        self._stream = self._make()
      given = b""
      if self._stream.needs_input:
        given, self._unread = self._unread or self._file.read(READ_BYTES), b""
        if not given:
          raise EOFError("it ends inside compressed data")
      data = self._stream.decompress(given, len(buffer))
      if self._stream.eof:
        self._unread, self._stream = self._stream.unused_data, None
      if data:
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[IO[bytes]]:
  """Opens a file, decompressed and in UTF-8, as its first bytes, not its name, say.

  Raises:
    DamagedFile: the file holds no text.
  """
  with _open_decompressed(path) as stream:
    stream = io.BufferedReader(stream, max(READ_BYTES, 512))
    start = stream.peek(4)
    for mark, encoding in UNICODE_MARKS.items():
      if start.startswith(mark):
        stream = io.BufferedReader(_Recoded(stream, encoding), READ_BYTES)
        break
    _check_text(path, stream.peek(4))
    yield stream


@contextlib.contextmanager
def _open_decompressed(path: str) -> Iterator[IO[bytes]]:
  with open_binary(path) as file:
    start = file.read(6)
    file.seek(0)
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), "")
    if kind == "zstd":
      import pyarrow

      yield pyarrow.CompressedInputStream(file, "zstd")
    elif kind == "gzip":
      with gzip.open(file) as stream:
        yield stream
    elif kind:
      yield _Streams(
        file, {"bz2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor}[kind]
      )
    else:
      yield file


def damaged_file(path: str, error: Exception, needed: str) -> errors.UserError:
  """Returns the error for a file whose reading failed with `error`.

  If the system failed, not the file, it is no DamagedFile.
  """
  if isinstance(error, OSError) and error.errno is not None:
    return unreadable_source(path, error)
  given = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
  return DamagedFile(f"{path} cannot be read to its end", given, needed)


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


def describe_bytes(start: bytes) -> str:
  """Returns what the first bytes of a file of another format look like."""
  marks = NO_TEXT | {mark: f"compressed by {kind}" for mark, kind in MAGIC.items()}
  kind = next((kind for mark, kind in marks.items() if start.startswith(mark)), "")
  if start[TAR_MARK[0] :].startswith(TAR_MARK[1]):
    kind = "a tar archive"
  if not kind and start.lstrip().startswith(b"<"):
    kind = "HTML or XML"
  return f"it looks like {kind}" if kind else f"it begins with {start[:8]!r}"


def _check_text(path: str, start: bytes) -> None:
  """Refuses a file that is no text, by its first bytes or because few are text."""
  text = start.decode(errors="surrogateescape")
  bad = len(SURROGATES.findall(text)) + text.count("\0")
  is_tar = start[TAR_MARK[0] :].startswith(TAR_MARK[1])
  if is_tar or start.startswith(tuple(NO_TEXT)):
    given = describe_bytes(start)
  elif tfrecord_length(start[: TFRECORD_HEADER.size]) >= 0:
    given = "it looks like a TFRecord file"
  elif text.count("\0") * 4 > len(text) >= 8:
    given = "it looks like UTF-16 or UTF-32 without a byte order mark"
  elif 32 <= bad > len(text) / 10:
    given = f"bytes of which {bad / len(text):.0%} are no text"
  else:
    return
  raise DamagedFile(
    f"{path} holds no text", given, "UTF-8, UTF-16 or UTF-32, plain, gz, bz2, xz or zst"
  )


def tfrecord_length(header: bytes) -> int:
  """Returns the bytes of data that the header of a TFRecord announces.

  -1 if these are not the 12 bytes of a header, whose last 4 are the masked CRC-32C of
  the others (RFC 3720, section B.4).
  """
  if len(header) < TFRECORD_HEADER.size:
    return -1
  crc = 0xFFFFFFFF
  for byte in header[:8]:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  crc ^= 0xFFFFFFFF
  masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
  length, checksum = TFRECORD_HEADER.unpack(header)
  return length if checksum == masked else -1


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
  """Splits (text, problems) chunks into lines, without their newlines (LF or CR LF)."""
  open_line, held = False, ""
  for text, problems in chunks:
    text = held + text
    held = "\r" if text.endswith("\r") else ""  # a newline may follow it
    *whole, rest = text.removesuffix("\r").split("\n")
    for line in whole:
      line = line.removesuffix("\r")
      yield line, True, problems
      problems, open_line = (), False
    if rest:
      yield rest, False, problems
      open_line = True
  if open_line or held:
    yield held, True, ()
