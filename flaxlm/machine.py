"""What a process finds and sets on its machine: platform, allocator, program cache.

No JAX here: `choose_platform` and `keep_programs` must run before it is imported.
"""

import contextlib
import ctypes
import glob
import hashlib
import importlib.util
import os
import pathlib
import platform
import sys
import tempfile
import time

from flaxlm.errors import UserError


def choose_platform() -> None:
  """Chooses CUDA or the CPU where libtpu is installed but there is no TPU.

  `plan` needs libtpu on such machines, and JAX would let it complain at length. If
  JAX_PLATFORMS is set, it is left alone.
  """
  if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
    return
  if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
    gpu = os.path.exists("/dev/nvidia0")
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if gpu else "cpu"


def keep_programs() -> None:
  """Makes JAX keep compiled programs in the user's cache directory, 4 GiB at most.

  Each kind of processor has its own directory, so that machines that share a home never
  load instructions that they lack. JAX's variables take precedence:
  JAX_COMPILATION_CACHE_DIR names another directory, without our limit, and
  JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  programs = pathlib.Path(cache) / "flaxlm" / "programs" / processor()
  try:
    programs.mkdir(mode=0o700, parents=True, exist_ok=True)
    # JAX writes the time of use last. An entry without it was cut short, for good.
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
  """Returns a hash of the model and instruction set of this machine's processor."""
  words = [platform.machine(), platform.processor()]
  with contextlib.suppress(OSError):
    lines = pathlib.Path(cpuinfo).read_text().split("\n\n")[0].splitlines()
    kinds = ("model name", "flags", "Features", "CPU part")
    words += [line for line in lines if line.startswith(kinds)]
  return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


@contextlib.contextmanager
def quiet_stderr():
  """Holds back what C++ libraries write to stderr; shows it if an exception follows.

  No log level stops some of it, such as absl's lines before it is initialised.
  """
  sys.stderr.flush()
  saved = os.dup(2)
  with tempfile.TemporaryFile() as held:
    os.dup2(held.fileno(), 2)
    try:
      yield
    except UserError:  # it says itself what was wrong
      raise
    except BaseException:
      held.seek(0)
      os.write(saved, held.read()[-4000:])
      raise
    finally:
      os.dup2(saved, 2)
      os.close(saved)


def keep_freed_memory() -> str:
  """Tells glibc to reuse what XLA:CPU frees; returns a line that says so, or why not.

  XLA:CPU frees its large temporaries after every step, glibc returns them to the
  kernel, and the kernel zeroes each page again: a step takes up to 1.7 times as long.
  Steps then run one after the other, in the thread that asks for them: glibc keeps
  large blocks only for the main thread, and two steps at once would take twice the
  memory. Call this before anything large is allocated. If MALLOC_MMAP_MAX_ is set,
  nothing is changed.
  """
  import jax

  if os.environ.get("MALLOC_MMAP_MAX_") or not sys.platform.startswith("linux"):
    return "allocator: as the environment sets it"
  m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # from glibc's malloc.h
  try:
    mallopt = ctypes.CDLL("libc.so.6").mallopt
  except (OSError, AttributeError):
    return "allocator: not glibc, left as it is"
  done = mallopt(m_mmap_max, 0) & mallopt(m_trim_threshold, -1)  # never
  done &= mallopt(m_top_pad, 64 << 20)
  if not done:
    return "allocator: mallopt refused"
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  return "allocator: glibc keeps freed memory"


def host_memory() -> float:
  """Returns the bytes of memory of this machine."""
  import psutil

  return float(psutil.virtual_memory().total)
