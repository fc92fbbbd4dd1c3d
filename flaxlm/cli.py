"""What the commands share: command lines, exit codes, the end of the process.

No JAX here: `--help` and errors in a config are answered before anything slow is
imported.
"""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable

from flaxlm import errors
from flaxlm.machine import choose_platform, keep_programs


def make_parser(doc: str, command: str) -> argparse.ArgumentParser:
  """Returns a parser whose description is the docstring of the command."""
  as_module = sys.orig_argv[1:2] == ["-m"]
  return argparse.ArgumentParser(
    prog=f"python -m flaxlm.{command}" if as_module else f"flaxlm {command}",
    description=doc,
    epilog="Any knob of flaxlm/config/base.py can be set: "
    "--config.optim.peak_learning_rate=1e-4",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def add_config(parser: argparse.ArgumentParser, text: str, **options) -> None:
  """Adds --config, and --allow for a config file that others may write."""
  parser.add_argument("--config", help=text, **options)
  parser.add_argument(
    "--allow", action="store_true",
    help="run a config file even if other users may write it",
  )  # fmt: skip


def parse_arguments(parser: argparse.ArgumentParser, argv: list[str] | None):
  """Returns (args, overrides); each `--config.key=value` is an override `key=value`."""
  if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions; this exits
    import argcomplete

    argcomplete.autocomplete(parser)
  args, rest = parser.parse_known_args(argv)
  prefix = "--config."
  for text in rest:
    if not text.startswith(prefix):
      known = " ".join(s for a in parser._actions for s in a.option_strings)
      raise errors.ConfigError(text, "an unknown argument", known, prefix + "KEY=VALUE")
  return args, [text.removeprefix(prefix) for text in rest]


def add_sampling(parser: argparse.ArgumentParser, max_tokens: int | None = 200) -> None:
  """Adds the flags of commands that write text; None: as far as the context goes."""
  known = f" ({max_tokens})" if max_tokens else " (the whole context)"
  parser.add_argument(
    "--max_tokens", type=int, default=max_tokens, help="new tokens per text" + known
  )
  parser.add_argument(
    "--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)"
  )
  parser.add_argument(
    "--top_k", type=int, default=0, help="only the k likeliest tokens; 0 is all (0)"
  )
  parser.add_argument(
    "--top_p", type=float, default=0.95,
    help="only the likeliest tokens that together have this probability (0.95)",
  )  # fmt: skip
  parser.add_argument("--seed", type=int, default=0, help="of the random choices (0)")
  parser.add_argument(
    "--stop", action="append", default=[], metavar="TEXT",
    help="text at which writing ends; may be repeated",
  )  # fmt: skip
  parser.add_argument(
    "--when_full", default="stop", choices=("stop", "continue"),
    help="when the context is full: stop, or continue from its last half (stop)",
  )  # fmt: skip


def sampling(args: argparse.Namespace) -> dict:
  """Returns the values of the flags of `add_sampling` that were given."""
  names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "when_full")
  return {name: value for name in names if (value := getattr(args, name)) is not None}


@contextlib.contextmanager
def naming_flags(args: argparse.Namespace):
  """Names an argument of a function as the user wrote it: max_tokens, --max_tokens."""
  try:
    yield
  except errors.ConfigError as error:
    if not hasattr(args, error.key):
      raise
    raise errors.ConfigError(f"--{error.key}", *error.rest) from None


def run_command(main: Callable[[], None], cache: bool = True) -> None:
  """Runs a command and ends the process with the exit code for what happened.

  If it fails in a distributed job, it leaves by `os._exit`: at JAX's shutdown barrier
  the other processes would wait five minutes for this one.

  Args:
    cache: keep compiled programs for the next run.
  """
  code = 0
  choose_platform()
  if cache:
    keep_programs()
  try:
    main()
  except errors.UserError as error:
    print(errors.terminal_text(error), file=sys.stderr)
    code = error.exit_code
  except BrokenPipeError:
    code = 141  # the reader of our output is gone, as in `| head`
  except SystemExit as stop:
    code = stop.code or 0
  except KeyboardInterrupt:
    print("flaxlm: interrupted", file=sys.stderr)
    code = errors.Preempted.exit_code
  except BaseException as error:
    code = _report(error)
  with contextlib.suppress(BrokenPipeError):
    sys.stdout.flush()
  sys.stderr.flush()
  if code and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
    os._exit(code)
  if code == 141:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  sys.exit(code)


def _report(error: BaseException) -> int:
  """Prints an error that no room expected; returns the exit code.

  A file that the system refuses is for the user to mend. All else is our bug.
  """
  if isinstance(error, OSError) and error.filename is not None:
    failure = errors.storage_failure(error.filename, error)
    print(errors.terminal_text(failure), file=sys.stderr)
    return failure.exit_code
  for line in "".join(traceback.format_exception(error)).splitlines():
    print(errors.printable(line, 2000), file=sys.stderr)
  return errors.UserError.exit_code
