"""Talk with a trained model, in its own chat template.

  python -m flaxlm.chat --workdir=runs/smollm2 --system="You answer in one sentence."

Each line is a turn, and the answer is printed as it is written. Ctrl-C stops an answer;
Ctrl-D ends the program; /new begins a new conversation. Lines may also come from a
pipe. A model without a chat template continues each line, and remembers none.
"""

import contextlib
import signal
import sys
from collections.abc import Iterable, Iterator

from flaxlm import cli, machine
from flaxlm.console import without_controls
from flaxlm.errors import ConfigError, UserError, terminal_text
from flaxlm.open_model import find_model, load_model

NEW = "/new"


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__, "chat")
  parser.add_argument("--workdir", required=True, help="directory of the run")
  parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest")
  parser.add_argument("--system", default="", help="what the model is told at first")
  cli.add_sampling(parser, max_tokens=None)
  args, overrides = cli.parse_arguments(parser, argv)
  find_model(args.workdir, args.step, overrides)
  # JAX is imported only now: --help and a wrong key have been answered.
  machine.keep_freed_memory()
  from flaxlm.inference.sampling import Sampling

  with cli.naming_flags(args):  # before a large model is read
    Sampling(args.temperature, args.top_k, args.top_p, args.seed)
  model = load_model(args.workdir, args.step, overrides=overrides)
  if args.system and model.template is None:
    raise ConfigError("--system", args.system, "a model with a chat template")
  with cli.naming_flags(args):
    model.stream([[0]], **cli.sampling(args))  # refuses wrong flags; writes nothing
  _talk(model, args, _read_lines())


def _talk(model, args, lines: Iterable[str]) -> None:
  """Answers each line; at a terminal, an error ends the turn alone."""
  first = [{"role": "system", "content": args.system}] if args.system else []
  messages = list(first)
  for line in lines:
    if line.strip() == NEW:
      messages = list(first)
    elif line.strip():
      asked = [*messages, {"role": "user", "content": line}]
      try:
        answer = _answer(model, args, asked)
      except UserError as error:
        if not sys.stdin.isatty():
          raise
        print(terminal_text(error), file=sys.stderr)
        continue
      messages = [*asked, {"role": "assistant", "content": answer}]


def _answer(model, args, messages: list[dict[str, str]]) -> str:
  """Prints the answer as it is written, until it ends or Ctrl-C; returns it."""
  options = cli.sampling(args)
  if model.template is None:
    writing = model.stream([messages[-1]["content"]], **options)
  else:
    writing = model.chat_stream(messages, **options)
  text, safe = "", without_controls if sys.stdout.isatty() else str
  with _stopped_by_ctrl_c() as is_stopped:
    for (new,) in writing:
      print(safe(new), end="", flush=True)
      text += new
      if is_stopped():
        break
  print(flush=True)
  if writing.finish == ["context"]:
    print(
      f"flaxlm: the context of {model.config.max_len} tokens is full; {NEW} begins "
      "again, --when_full=continue forgets the oldest",
      file=sys.stderr,
    )
  return text


def _read_lines() -> Iterator[str]:
  """Yields what the user types, or the lines of a pipe."""
  if not sys.stdin.isatty():
    for line in sys.stdin:
      yield line.removesuffix("\n")
    return
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  history, and editing of lines

  while True:
    try:
      yield input("> ")
    except EOFError:
      print()
      return
    except KeyboardInterrupt:
      print("\n(Ctrl-D ends the program)")


@contextlib.contextmanager
def _stopped_by_ctrl_c():
  """Returns a function that says whether Ctrl-C was pressed; twice interrupts."""
  pressed = []

  def note(number, frame):
    pressed.append(number)
    if len(pressed) > 1:
      signal.default_int_handler(number, frame)

  before = signal.signal(signal.SIGINT, note)
  try:
    yield lambda: bool(pressed)
  finally:
    signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
  cli.run_command(main)
