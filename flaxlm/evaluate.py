"""Evaluate a trained model on the held-out split of a token store.

  python -m flaxlm.evaluate --workdir=runs/quickstart
  python -m flaxlm.evaluate --workdir=runs/quickstart --config.data.store=data/other

Prints loss (nats per token), perplexity and bits per byte, beside those of a model that
knows only word frequencies. The same checkpoint and store give the same numbers again.
"""

import json
import pathlib

from flaxlm import cli
from flaxlm.errors import DataError


def main(argv: list[str] | None = None) -> None:
  parser = cli.parser(__doc__, "evaluate")
  parser.add_argument("--workdir", required=True, help="directory of the run")
  parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest")
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  args, overrides = cli.parse(parser, argv)
  config = cli.load_run(args.workdir, overrides)
  # JAX is imported only now: --help and a wrong key have been answered.
  from flaxlm.parallel import hosts

  hosts.keep_freed_memory()
  result = evaluate_run(config, pathlib.Path(args.workdir), args.step)
  if args.json:
    print(json.dumps(result))
    return
  print(
    f"step {result['step']}: loss {result['loss']:.4f} nats/token, "
    f"perplexity {result['perplexity']:.2f}, on {result['tokens']:,} tokens\n"
    f"bits per byte {result['bits_per_byte']:.4f} "
    f"(word frequencies alone: {result['unigram_bits_per_byte']:.4f})"
  )


def evaluate_run(config, workdir: pathlib.Path, step: int | None) -> dict[str, float]:
  """Returns the metrics of one checkpoint on config.data.store."""
  import jax

  from flaxlm.data import baseline
  from flaxlm.data.feed import Feed
  from flaxlm.parallel.mesh import make_mesh
  from flaxlm.parallel.sharding import use_mesh
  from flaxlm.training.evaluation import evaluate, make_eval_step
  from flaxlm.training.state import restore_model

  mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  rules = config.mesh.rules.to_dict()
  with use_mesh(mesh, rules):
    feed = Feed(config, mesh, rules)
    if feed.validation is None:
      raise DataError(
        "there is no held-out text to evaluate on\n"
        f"  given:  {config.data.store} (loader {config.data.loader})\n"
        "  needed: a store prepared with config.data.validation_fraction above 0"
      )
    model, meta = restore_model(workdir / "checkpoints", config, mesh, rules, step)
    if meta["tokenizer_sha256"] != feed.tokenizer_sha256:
      raise DataError(
        "the token store was made with another tokenizer than the model's\n"
        f"  given:  {config.data.store}, {feed.tokenizer_sha256[:12]}\n"
        f"  needed: {meta['tokenizer_sha256'][:12]}\n"
        f"  try:    prepare it with --config.tokenizer.path={workdir}/tokenizer.model"
      )
    result = evaluate(
      model,
      feed.read_validation(),
      jax.jit(make_eval_step(config.step.chunk_size)),
      baseline.bytes_per_token(feed.validation),
    )
  unigram = baseline.unigram_bits_per_byte(feed.train, feed.validation)
  return {"step": meta["step"], **result, "unigram_bits_per_byte": unigram}


if __name__ == "__main__":
  cli.run(main)
