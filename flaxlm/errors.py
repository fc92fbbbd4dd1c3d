"""The errors that a user can cause or must act on, each with its exit code.

All are `ValueError`s, which a caller in Python may catch. `cli.run_command` prints them
in at most five lines without a traceback. Any other exception is our bug and keeps its
traceback.
"""


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
    lines = [what] + [f"given:  {given}"] * (given is not None)
    lines += [f"needed: {needed}"] * bool(needed) + [f"try:    {hint}"] * bool(hint)
    super().__init__("\n  ".join(lines))


class ConfigError(UserError):
  """A key or value of the config or command line cannot be used."""

  exit_code = 2

  def __init__(self, key: str, given: object, needed: str, hint: str = ""):
    self.key = key
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
  return "flaxlm: " + "\n".join(str(error).splitlines()[:5])


HANG_EXIT_CODE = 85  # the watchdog ends the process itself: nothing is left to catch it
