"""The errors that a user can cause or must act on, each with its exit code.

All are `ValueError`s: a caller in Python may catch that alone. `cli.run` prints them in
at most five lines without a traceback; all else is our bug and keeps its traceback.
"""


class UserError(ValueError):
  """Base of the errors below; `exit_code` follows sysexits.h where it has one."""

  exit_code = 70


class ConfigError(UserError):
  """A key or value of the config or command line cannot be used."""

  exit_code = 2

  def __init__(self, key: str, given: object, needed: str, hint: str = ""):
    self.key = key
    lines = [f"{key} cannot be used", f"given:  {given}", f"needed: {needed}"]
    super().__init__("\n  ".join(lines + [f"try:    {hint}"] * bool(hint)))


class DataError(UserError):
  """Data was read and is wrong: corrupt, empty, or not what the run started with."""

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


HANG_EXIT_CODE = 85  # the watchdog ends the process itself: nobody is left to catch
