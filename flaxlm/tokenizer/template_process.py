"""Asks a process to render chat templates, and ends it if it takes too long.

One process serves all templates of this one. It is started by the first template and
ends with us, since its stdin does.
"""

import atexit
import json
import os
import pathlib
import select
import subprocess
import sys
import threading

from flaxlm.tokenizer import template_worker

_WAIT = 60  # seconds until it is given up; the process itself counts CPU time


class TemplateFault(ValueError):
  """What a template did wrong, in one line."""


class TemplateProcess:
  """A process that renders templates; a new one follows one that has ended.

  Args:
    seconds: of CPU time per request.
    memory: bytes of address space.
  """

  def __init__(
    self, seconds: int = template_worker.SECONDS, memory: int = template_worker.MEMORY
  ):
    self._seconds, self._memory = seconds, memory
    self._process: subprocess.Popen | None = None
    self._owner = 0  # a forked process must not share the pipes
    self._numbers: dict[tuple[str, str], int] = {}
    self._lock = threading.Lock()

  def compile(self, source: str, now: str) -> None:
    """Compiles a template.

    Raises:
      TemplateFault: it is not Jinja2, or takes too much time or memory.
      ImportError: jinja2 is not installed.
    """
    with self._lock:
      self._number(source, now)

  def render(self, source: str, now: str, variables: list[dict]) -> list[str]:
    """Returns the text of a template with each of `variables`; raises as `compile`."""
    with self._lock:
      number = self._number(source, now)
      return self._ask({"number": number, "variables": variables})["texts"]

  def close(self) -> None:
    """Ends the process, if there is one."""
    process, self._process, self._numbers = self._process, None, {}
    if process and self._owner == os.getpid():
      process.kill()
      process.wait()
      process.stdin.close()
      process.stdout.close()

  def _number(self, source: str, now: str) -> int:
    alive = self._process and self._owner == os.getpid()
    if not alive or self._process.poll() is not None:
      self.close()
    if (source, now) not in self._numbers:
      answer = self._ask({"source": source, "now": now})
      self._numbers[source, now] = answer["number"]
    return self._numbers[source, now]

  def _ask(self, request: dict) -> dict:
    """Returns the answer of the process; ends it if there is none in time."""
    if self._process is None:
      self._start()
    try:
      self._process.stdin.write(json.dumps(request).encode() + b"\n")
      self._process.stdin.flush()
      line = self._read_line()
    except BrokenPipeError:
      line = b""
    except BaseException:  # an interrupt: the answer would come to the next request
      self.close()
      raise
    if not line:
      self.close()
      raise TemplateFault(
        f"it took more than {self._seconds} s, or more than {self._memory >> 20} MiB"
      )
    answer = json.loads(line)
    if "missing" in answer:
      raise ImportError("jinja2")
    if "error" in answer:
      raise TemplateFault(answer["error"])
    return answer

  def _start(self) -> None:
    file = str(pathlib.Path(template_worker.__file__))
    # -P: the folder of the script is no place to import from.
    self._process = subprocess.Popen(
      [sys.executable, "-P", file, str(self._seconds), str(self._memory)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )
    self._owner = os.getpid()
    atexit.unregister(self.close)
    atexit.register(self.close)

  def _read_line(self) -> bytes:
    """Returns a line of the process; b"" if it ends, or says nothing for too long."""
    descriptor, parts = self._process.stdout.fileno(), []
    while not parts or not parts[-1].endswith(b"\n"):
      if not select.select([descriptor], [], [], _WAIT)[0]:
        return b""
      parts.append(os.read(descriptor, 1 << 16))
      if not parts[-1]:
        return b""
    return b"".join(parts)


templates = TemplateProcess()
