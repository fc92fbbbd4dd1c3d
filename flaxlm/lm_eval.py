"""Run EleutherAI's lm-eval on a trained model, with all of its own flags.

  python -m flaxlm.lm_eval --workdir=runs/a --tasks=arc_easy --output_path=results
  python -m flaxlm.lm_eval --workdir=runs/a --include_path=my_tasks --tasks=my_task

The model may be a run, one of its checkpoints or a Hugging Face directory. All flags
but --workdir and --step are those of `lm-eval run`, which the extra lm-eval installs.
The file of --use_cache is named after the weights, so another checkpoint never gets old
answers; with it, a killed run continues.
"""

import sys

from flaxlm import cli
from flaxlm.errors import ConfigError

_CACHE_FLAGS = ("--use_cache", "-c")


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__, "lm_eval")
  parser.add_argument("--workdir", required=True, help="directory of the model")
  parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest")
  args, rest = parser.parse_known_args(argv)
  for text in rest:
    flag = text.partition("=")[0]
    if flag in ("--model", "-M"):
      raise ConfigError(flag, "a model of lm-eval", "--workdir: it is the model")
    if flag in ("--device", "--max_batch_size"):
      needed = "nothing: JAX chooses the device, and flaxlm the size of batches"
      raise ConfigError(flag, "a value", needed, "JAX_PLATFORMS=cpu, --batch_size=8")
  # lm-eval is imported only now: --help has been answered, without lm-eval too.
  try:
    from lm_eval.__main__ import cli_evaluate
  except ImportError as error:
    raise ConfigError(
      "flaxlm lm-eval", f"no lm-eval ({error})", "lm-eval 0.4.13", "pip install lm-eval"
    ) from error
  from flaxlm.evals.harness import register
  from flaxlm.evals.saved import weights_sha256
  from flaxlm.open_model import load_model

  loaded = load_model(args.workdir, args.step)
  register(loaded)
  rest = _name_caches(rest, weights_sha256(args.workdir, loaded.step)[:12])
  sys.argv = ["lm-eval", "run", "--model", "flaxlm", *rest]
  cli_evaluate()


def _name_caches(arguments: list[str], weights: str) -> list[str]:
  """Returns lm-eval's arguments, with the weights in the name of its cache."""
  named, is_path = [], False
  for text in arguments:
    flag, equals, path = text.partition("=")
    if is_path:
      text, is_path = f"{text}-{weights}", False
    elif flag in _CACHE_FLAGS and equals:
      text = f"{flag}={path}-{weights}"
    elif flag in _CACHE_FLAGS:
      is_path = True
    named.append(text)
  return named


if __name__ == "__main__":
  cli.run_command(main)
