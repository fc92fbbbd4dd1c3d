"""Evaluate a trained model on the held-out split of a token store.

  python -m flaxlm.evaluate --workdir=runs/quickstart
  python -m flaxlm.evaluate --workdir=runs/quickstart --config.data.store=data/other

Prints loss (nats per token), perplexity and bits per byte, beside those of a model that
knows only word frequencies. The same checkpoint and store give the same numbers again.
"""

import json
import pathlib

from flaxlm import cli
from flaxlm import config as configs
from flaxlm.errors import DataError


def main(argv: list[str] | None = None) -> None:
  parser = cli.parser(__doc__, "evaluate")
  parser.add_argument("--workdir", required=True, help="directory of the run")
  parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest")
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  args, overrides = cli.parse(parser, argv)
  config = configs.load_run(args.workdir, overrides)
  # JAX is imported only now: --help and a wrong key have been answered.
  from flaxlm.parallel import hosts

  hosts.keep_freed_memory()
  result = evaluate_run(config, pathlib.Path(args.workdir), args.step)
  if args.json:
    print(json.dumps(result))
    return
  print(describe(result))


def describe(result: dict) -> str:
  """The numbers in two lines: the loss, and what it is worth."""
  unit = "nats/token" if "perplexity" in result else "nats/label"
  line = f"step {result['step']}: loss {result['loss']:.4f} {unit}, "
  if "perplexity" in result:
    line += f"perplexity {result['perplexity']:.2f}, "
  line += f"on {result['tokens']:,} of them\n"
  if "bits_per_byte" in result:
    line += (
      f"bits per byte {result['bits_per_byte']:.4f} "
      f"(word frequencies alone: {result['unigram_bits_per_byte']:.4f})"
    )
  elif "unigram_loss" in result:
    line += f"word frequencies alone: {result['unigram_loss']:.4f} nats/token"
  else:
    known = ("step", "loss", "tokens", "perplexity")
    scores = {name: value for name, value in result.items() if name not in known}
    line += "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
  return line.rstrip()


def evaluate_run(config, workdir: pathlib.Path, step: int | None) -> dict[str, float]:
  """Returns the metrics of one checkpoint on config.data.store."""
  import jax

  from flaxlm import weights
  from flaxlm.data import baseline
  from flaxlm.data.feed import Feed
  from flaxlm.data.tokenizer_files import find_tokenizer
  from flaxlm.loop import scorer
  from flaxlm.parallel.mesh import axis_sizes, make_mesh
  from flaxlm.program import use_config_mesh
  from flaxlm.training.evaluation import evaluate, make_eval_step

  mesh = make_mesh(**axis_sizes(config.mesh))
  rules = config.mesh.rules.to_dict()
  with use_config_mesh(config, mesh):
    tokenizer, template = find_tokenizer(workdir) or "", workdir / weights.TEMPLATE
    if template.exists():
      config.task.chat_template = str(template)
    feed = Feed(config, mesh, tokenizer, training=False)
    if feed.validation is None:
      raise DataError(
        "there is no held-out text to evaluate on\n"
        f"  given:  {config.data.store} (loader {config.data.loader})\n"
        "  needed: a store prepared with config.data.validation_fraction above 0"
      )
    model, meta = weights.restore_model(workdir, config, mesh, rules, step)
    if meta["tokenizer_sha256"] != feed.tokenizer_sha256:
      raise DataError(
        "the token store was made with another tokenizer than the model's\n"
        f"  given:  {config.data.store}, {feed.tokenizer_sha256[:12]}\n"
        f"  needed: {meta['tokenizer_sha256'][:12]}\n"
        f"  try:    prepare it with --config.tokenizer.path={tokenizer}"
      )
    result = evaluate(
      model,
      feed.read_validation(),
      jax.jit(make_eval_step()),
      feed.bytes_per_token(),
      score=scorer(feed),
    )
  result = {"step": meta["step"], **result}
  if feed.examples is not None:
    return result
  if "bits_per_byte" in result:
    unigram = baseline.unigram_bits_per_byte(feed.train, feed.validation)
    return result | {"unigram_bits_per_byte": unigram}
  batches = feed.num_eval_batches
  unigram = baseline.unigram_nats(feed.train, feed.validation, batches)
  return result | {"unigram_loss": unigram}


if __name__ == "__main__":
  cli.run(main)
