"""Write text with a trained model.

  python -m flaxlm.generate --workdir=runs/quickstart --prompt="def main("

A single text is printed as it is written; with several --prompt or --num_samples, all
are computed together and printed at the end. Without --prompt the model begins a
document of its own. --workdir may also be one checkpoint, or a Hugging Face model.
"""

import sys
from collections.abc import Iterable

from flaxlm import cli, machine
from flaxlm.console import without_controls
from flaxlm.errors import ConfigError
from flaxlm.open_model import find_model, load_model


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__, "generate")
  parser.add_argument("--workdir", required=True, help="directory of the run")
  parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest")
  parser.add_argument(
    "--prompt", action="append", help="text to continue; may be repeated"
  )
  parser.add_argument("--num_samples", type=int, default=1, help="texts per prompt (1)")
  parser.add_argument(
    "--special", action="store_true",
    help="names of special tokens in a prompt are those tokens, not text",
  )  # fmt: skip
  cli.add_sampling(parser)
  args, overrides = cli.parse_arguments(parser, argv)
  if args.num_samples < 1:
    needed = "a whole number from 1 up"
    raise ConfigError("--num_samples", args.num_samples, needed)
  find_model(args.workdir, args.step, overrides)
  # JAX is imported only now: --help and a wrong key have been answered.
  machine.keep_freed_memory()
  from flaxlm.inference.sampling import Sampling

  with cli.naming_flags(args):  # before a large model is read
    Sampling(args.temperature, args.top_k, args.top_p, args.seed)
  model = load_model(args.workdir, args.step, overrides=overrides)
  prompts = [text for text in args.prompt or [""] for _ in range(args.num_samples)]
  with cli.naming_flags(args):
    writing = model.stream(prompts, specials=args.special, **cli.sampling(args))
    _print_texts(prompts, writing)
  if "context" in writing.finish:
    print(
      f"flaxlm: the context of {model.config.max_len} tokens is full; "
      "--when_full=continue goes on from its last half",
      file=sys.stderr,
    )


def _print_texts(prompts: list[str], pieces: Iterable[list[str]]) -> None:
  """Prints one text as it comes, several when all are complete."""
  safe = without_controls if sys.stdout.isatty() else str
  if len(prompts) == 1:
    print(prompts[0], end="", flush=True)
    for (new,) in pieces:
      print(safe(new), end="", flush=True)
    print()
    return
  texts = list(prompts)
  for new in pieces:
    texts = [text + more for text, more in zip(texts, new, strict=True)]
  for i, text in enumerate(texts, 1):
    print(f"--- {i} of {len(texts)} ---\n{safe(text)}")


if __name__ == "__main__":
  cli.run_command(main)
