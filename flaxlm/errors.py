"""The errors that a user can cause or must act on, each with its exit code.

All are `ValueError`s, which a caller in Python may catch. `cli.run_command` prints them
in at most five lines without a traceback. Any other exception is our bug and keeps its
traceback.

A message repeats what was given, which may come from a hostile file: it is bounded, and
no control character in it reaches the terminal.
"""

import errno
import re

# C0, DEL, C1 (0x9b begins commands as ESC [ does), line separators, changes of the
# direction of writing, and halves of surrogate pairs, which cannot be printed at all.
_UNPRINTABLE = re.compile(
  "[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# user:password@ in an address, and the tokens of common services.
SECRET = re.compile(
  r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{36,}"
  r"|\bsk-(?:proj-|ant-)?[A-Za-z0-9]{20,}|\bxox[abp]-[0-9A-Za-z-]{20,}"
  r"|\bAKIA[0-9A-Z]{16}\b"
)
MAX_ECHO = 400  # characters of a given value in a message
_MAX_LINE = 2000


def printable(text: object, limit: int = MAX_ECHO) -> str:
  """Returns a text in one line that is safe to print: escaped and cut in the middle.

  Passwords in addresses, and tokens of common services, are masked.

  Args:
    limit: characters of the text that are kept.
  """
  text = str(text)
  length, half = len(text), 1 << 18
  text = SECRET.sub("[secret]", text[:half] + text[half:][-half:])
  if len(text) > limit:
    cut = f" ... {length - limit} characters ... "
    text = text[: limit - limit // 2] + cut + text[-(limit // 2) :]
  return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


class UserError(ValueError):
  """Base of the errors below; `exit_code` follows sysexits.h where it has one.

  Args:
    what: what is wrong, in one line.
    given: what was found; None omits the line.
    needed: what would have worked.
    hint: what to try, such as the flag to change.
  """

  exit_code = 70

  def __init__(self, what: str, given: object = None, needed: str = "", hint: str = ""):
    lines = [printable(line, _MAX_LINE) for line in str(what).split("\n")]
    if given is not None:
      lines.append(f"  given:  {printable(given)}")
    if needed:
      lines.append(f"  needed: {printable(needed, _MAX_LINE)}")
    if hint:
      lines.append(f"  try:    {printable(hint, _MAX_LINE)}")
    super().__init__("\n".join(lines))


class ConfigError(UserError):
  """A key or value of the config or command line cannot be used."""

  exit_code = 2

  def __init__(self, key: str, given: object, needed: str, hint: str = ""):
    self.key, self.rest = key, (given, needed, hint)
    super().__init__(f"{key} cannot be used", given, needed, hint)


class DataError(UserError):
  """Data is wrong: corrupt, empty, or not what the run started with."""

  exit_code = 65


class MissingInputError(UserError):
  """A file or directory to read does not exist."""

  exit_code = 66


class OutputError(UserError):
  """A directory cannot be written, or belongs to another run."""

  exit_code = 73


class StorageError(UserError):
  """Reading or writing failed for reasons outside the data: disk full, bad device."""

  exit_code = 74


class Preempted(UserError):
  """The run was told to stop and has saved; the same command continues it."""

  exit_code = 75


class NumericsError(UserError):
  """Too many steps in a row had a loss or gradient that is not finite."""

  exit_code = 86


def terminal_text(error: UserError) -> str:
  """Returns what a command prints of an error: at most five lines."""
  return "flaxlm: " + "\n".join(str(error).split("\n")[:5])


def storage_failure(name: object, error: OSError, writing: bool = False) -> UserError:
  """Returns the error for what the operating system refused.

  Args:
    name: what was to be read or written, as the user knows it: a path or a flag.
    writing: exit with 73 where another place would do; else it is the reading of a
      file, or unknown.
  """
  reason = error.strerror or str(error)
  given = f"{error.filename}: {reason}" if error.filename is not None else reason
  if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
    return StorageError(f"{name} cannot be used", given, "a device with space")
  if writing or error.errno == errno.EROFS:
    needed = "a place that exists and can be written"
    return OutputError(f"{name} cannot be written", given, needed)
  if error.errno == errno.ENOENT:
    return MissingInputError(f"{name} does not exist", given)
  return StorageError(f"{name} cannot be used", given, "a file that can be read")


HANG_EXIT_CODE = 85  # the watchdog ends the process itself: nothing is left to catch it
