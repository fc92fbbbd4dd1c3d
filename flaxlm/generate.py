"""Write text with a trained model.

  python -m flaxlm.generate --workdir=runs/quickstart --prompt="def main("

A single text is printed as it is written; with several --prompt or --num_samples, all
are computed together and printed at the end. Without --prompt the model begins a
document of its own.
"""

from collections.abc import Iterator

from flaxlm import cli, machine
from flaxlm.errors import ConfigError
from flaxlm.runs.directory import load_run_config


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__, "generate")
  parser.add_argument("--workdir", required=True, help="directory of the run")
  parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest")
  parser.add_argument(
    "--prompt", action="append", help="text to continue; may be repeated"
  )
  parser.add_argument("--num_samples", type=int, default=1, help="texts per prompt (1)")
  parser.add_argument(
    "--max_tokens", type=int, default=200, help="new tokens per text (200)"
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
  args, overrides = cli.parse_arguments(parser, argv)
  for name in ("num_samples", "max_tokens"):
    if getattr(args, name) < 1:
      raise ConfigError(f"--{name}", getattr(args, name), "a whole number from 1 up")
  config = load_run_config(args.workdir, overrides)
  machine.keep_freed_memory()
  # JAX is imported only now: --help and a wrong key have been answered.
  from flaxlm.inference.sampling import Sampling
  from flaxlm.inference.text import load_for_decoding, tokenize_prompt, write_texts
  from flaxlm.tokenizer.files import load_tokenizer

  sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
  tokenizer = load_tokenizer(args.workdir)
  prompts = [text for text in args.prompt or [""] for _ in range(args.num_samples)]
  ids = [tokenize_prompt(tokenizer, text) for text in prompts]
  model = load_for_decoding(args.workdir, config, args.step)
  _print_texts(prompts, write_texts(model, tokenizer, ids, args.max_tokens, sampling))


def _print_texts(prompts: list[str], pieces: Iterator[list[str]]) -> None:
  """Prints one text as it comes, several when all are complete."""
  if len(prompts) == 1:
    print(prompts[0], end="", flush=True)
    for (new,) in pieces:
      print(new, end="", flush=True)
    print()
    return
  texts = list(prompts)
  for new in pieces:
    texts = [text + more for text, more in zip(texts, new, strict=True)]
  for i, text in enumerate(texts, 1):
    print(f"--- {i} of {len(texts)} ---\n{text}")


if __name__ == "__main__":
  cli.run_command(main)
