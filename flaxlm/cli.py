"""What every door shares: the command line, the exit codes, the end of a process.

No JAX here: `--help` and a refused config answer before anything slow is imported.
"""

import argparse
import contextlib
import glob
import hashlib
import importlib.util
import os
import pathlib
import platform
import sys
import time
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


def keep_programs() -> None:
  """Has JAX keep compiled programs in the user's cache directory, 4 GiB at most.

  The directory is one kind of processor's own: in a home that machines share, none
  loads instructions that it lacks. JAX's variables rule: JAX_COMPILATION_CACHE_DIR is
  another place, with no limit of ours, and JAX_ENABLE_COMPILATION_CACHE=false is none.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  programs = pathlib.Path(cache) / "flaxlm" / "programs" / processor()
  try:
    programs.mkdir(mode=0o700, parents=True, exist_ok=True)
    # JAX writes the time of use last. Without it an entry is torn, and would stay so.
    for entry in programs.glob("*-cache"):
      used = entry.with_name(entry.name.removesuffix("cache") + "atime")
      if not used.exists() and time.time() - entry.stat().st_mtime > 60:
        entry.unlink(missing_ok=True)
  except OSError:  # a home that is read-only, or full
    return
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
  os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 << 30))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def processor(cpuinfo: str = "/proc/cpuinfo") -> str:
  """A name for the instructions and the model of this machine's processor."""
  words = [platform.machine(), platform.processor()]
  with contextlib.suppress(OSError):
    lines = pathlib.Path(cpuinfo).read_text().split("\n\n")[0].splitlines()
    kinds = ("model name", "flags", "Features", "CPU part")
    words += [line for line in lines if line.startswith(kinds)]
  return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def run(main: Callable[[], None], cache: bool = True) -> None:
  """Runs a door and ends the process with the exit code of what happened.

  With `cache`, what it compiles is kept for the next time.

  A process of a distributed job leaves by `os._exit`: JAX's shutdown barrier would make
  the others wait five minutes for one that failed.
  """
  code = 0
  choose_platform()
  if cache:
    keep_programs()
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
