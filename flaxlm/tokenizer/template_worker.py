"""Renders chat templates in a process of its own: a template is a program of others.

Jinja's sandbox keeps a template from files and from Python, but not from endless loops
or gigabytes. Only a process can be bounded in both, so this file is run as a script by
template_process.py and imports nothing of ours. Each line of stdin is a JSON request,
each line of stdout its answer. It ends when stdin does.
"""

import contextlib
import datetime
import json
import signal
import sys

MEMORY = 1 << 29  # bytes of address space
SECONDS = 5  # of CPU time per request, give or take one
OUTPUT = 1 << 24  # characters


def compile_template(source: str, now: str):
  """Compiles Jinja2 source with what `transformers` offers to templates."""
  import jinja2
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """Ignores {% generation %}, which some templates put around what is learnt."""

    tags = frozenset({"generation"})

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  def refuse(message):
    raise jinja2.TemplateError(message)

  def to_json(value, indent=None, **options):
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, jinja2.ext.loopcontrols],
  )
  environment.filters["tojson"] = to_json  # the built-in one escapes HTML
  environment.globals["raise_exception"] = refuse
  date = datetime.datetime.fromisoformat(now)
  environment.globals["strftime_now"] = date.strftime
  return environment.from_string(source)


def render(template, variables: dict) -> str:
  """Returns the text of a template; ValueError if it is too long."""
  parts, size = [], 0
  for part in template.generate(**variables):
    parts.append(part)
    size += len(part)
    if size > OUTPUT:
      raise ValueError(f"more than {OUTPUT:,} characters of output")
  return "".join(parts)


def limit_cpu(seconds: int) -> None:
  """Has the system end this process if it needs more than `seconds` from now on."""
  import resource

  used = resource.getrusage(resource.RUSAGE_SELF)
  soft = int(used.ru_utime + used.ru_stime) + seconds + 1
  _, hard = resource.getrlimit(resource.RLIMIT_CPU)
  resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def limit_memory(size: int) -> None:
  """Bounds the address space of this process, in bytes."""
  import resource

  # macOS knows no such limit; that of time remains.
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks
  seconds, memory = map(int, sys.argv[1:])
  limit_memory(memory)
  templates = []
  for line in sys.stdin.buffer:
    limit_cpu(seconds)
    try:
      request = json.loads(line)
      if "source" in request:
        templates.append(compile_template(request["source"], request["now"]))
        answer = {"number": len(templates) - 1}
      else:
        template = templates[request["number"]]
        answer = {"texts": [render(template, v) for v in request["variables"]]}
    except ImportError:
      answer = {"missing": True}
    except Exception as error:  # whatever a template raises is its own fault
      kind, refused = type(error).__name__, type(error).__name__ == "TemplateError"
      answer = {"error": f"{error}"[:300] if refused else f"{kind}: {error}"[:300]}
      del error
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
  main()
