"""What every door shares: the command line, the exit codes, the end of a process.

No JAX here: `--help` and a refused config answer before anything slow is imported.
"""

import argparse
import contextlib
import glob
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable

from flaxlm import errors


def parser(doc: str, door: str) -> argparse.ArgumentParser:
  return argparse.ArgumentParser(
    prog=f"python -m flaxlm.{door}",
    description=doc,
    epilog="Any knob of configs/base.py can be set: "
    "--config.optim.peak_learning_rate=1e-4",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def parse(parser: argparse.ArgumentParser, argv: list[str] | None):
  """Returns (args, overrides): an override is what follows `--config.`: `key=value`."""
  args, rest = parser.parse_known_args(argv)
  prefix = "--config."
  for text in rest:
    if not text.startswith(prefix):
      known = " ".join(s for a in parser._actions for s in a.option_strings)
      raise errors.ConfigError(text, "an unknown argument", known, prefix + "KEY=VALUE")
  return args, [text.removeprefix(prefix) for text in rest]


def choose_platform() -> None:
  """Keeps JAX from asking a libtpu for TPUs that are not there: it complains at length.

  `plan` needs libtpu on machines without a TPU; JAX_PLATFORMS, if set, is left alone.
  """
  if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
    return
  if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
    gpu = os.path.exists("/dev/nvidia0")
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if gpu else "cpu"


def run(main: Callable[[], None]) -> None:
  """Runs a door and ends the process with the exit code of what happened.

  A process of a distributed job leaves by `os._exit`: JAX's shutdown barrier would make
  the others wait five minutes for one that failed.
  """
  code = 0
  choose_platform()
  try:
    main()
  except errors.UserError as error:
    lines = str(error).splitlines()[:5]
    print("\n".join([f"flaxlm: {lines[0]}", *lines[1:]]), file=sys.stderr)
    code = error.exit_code
  except BrokenPipeError:
    code = 141  # the reader of our output has gone, as in `| head`
  except SystemExit as stop:
    code = stop.code or 0
  except KeyboardInterrupt:
    print("flaxlm: interrupted", file=sys.stderr)
    code = errors.Preempted.exit_code
  except BaseException:
    traceback.print_exc()
    code = errors.UserError.exit_code
  with contextlib.suppress(BrokenPipeError):
    sys.stdout.flush()
  sys.stderr.flush()
  if code and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
    os._exit(code)
  if code == 141:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  sys.exit(code)
