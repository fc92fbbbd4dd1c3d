"""The scores of a run on held-out data, beside those of token frequencies alone."""

import pathlib
from collections.abc import Callable

import jax

from flaxlm.data.batches import token_frequencies
from flaxlm.data.feed import Feed
from flaxlm.data.tasks.labels import Labels
from flaxlm.data.tasks.scores import score_predictions
from flaxlm.errors import ConfigError, DataError
from flaxlm.parallel.mesh import axis_sizes, make_mesh
from flaxlm.runs import weights
from flaxlm.runs.binding import trained_config
from flaxlm.runs.directory import RunFiles
from flaxlm.runs.program import open_feed, use_config_mesh
from flaxlm.tokenizer.files import find_tokenizer
from flaxlm.training.checkpoint import read_meta
from flaxlm.training.evaluation import evaluate, make_eval_step


def evaluate_run(config, workdir: pathlib.Path, step: int | None) -> dict[str, float]:
  """Returns the metrics of a checkpoint on the held-out data of `config`.

  Args:
    config: as the run stored it, with the user's changes.
    step: of the checkpoint; None takes the newest.

  Raises:
    DataError: nothing is held out, or the data was made with another tokenizer.
  """
  mesh = make_mesh(**axis_sizes(config.mesh))
  rules = config.mesh.rules.to_dict()
  with use_config_mesh(config, mesh):
    tokenizer = find_tokenizer(workdir) or ""
    template = RunFiles(workdir).chat_template
    template = str(template) if template.exists() else ""
    labels = _trained_labels(config, read_meta(RunFiles(workdir).checkpoints, step))
    feed = open_feed(config, mesh, tokenizer, template, training=False, labels=labels)
    if feed.validation is None:
      raise DataError(
        "there is no held-out text to evaluate on",
        f"{config.data.store} (loader {config.data.loader})",
        "a store prepared with config.data.validation_fraction above 0",
      )
    model, meta = weights.restore_model(workdir, config, mesh, rules, step)
    if meta["tokenizer_sha256"] != feed.tokenizer_sha256:
      raise DataError(
        "the token store was made with another tokenizer than the model's",
        f"{config.data.store}, {feed.tokenizer_sha256[:12]}",
        meta["tokenizer_sha256"][:12],
        f"prepare it with --config.tokenizer.path={tokenizer}",
      )
    result = evaluate(
      model,
      feed.read_validation(),
      jax.jit(make_eval_step()),
      feed.bytes_per_token(),
      score=make_scorer(feed),
    )
  result = {"step": meta["step"], **result}
  if feed.examples is not None:
    return result
  if "bits_per_byte" in result:
    unigram = token_frequencies.unigram_bits_per_byte(feed.train, feed.validation)
    return result | {"unigram_bits_per_byte": unigram}
  batches = feed.num_eval_batches
  unigram = token_frequencies.unigram_nats(feed.train, feed.validation, batches)
  return result | {"unigram_loss": unigram}


def _trained_labels(config, meta: dict) -> Labels:
  """Returns the classes that a checkpoint was trained with, which config must name."""
  kind, given = config.task.kind, config.task.labels
  before = trained_config(meta)
  trained = before.task.labels if before else ()
  if kind in ("classify", "tag") and trained and trained != given:
    raise ConfigError(
      "config.task.labels", " ".join(given) or "none",
      f"{' '.join(trained)}: the model's classes", ",".join(trained),
    )  # fmt: skip
  numbered = kind != "choice" and meta.get("labels_numbered", True)
  return Labels(given, numbered=numbered)


def make_scorer(feed: Feed) -> Callable[..., dict[str, float]] | None:
  """Returns what turns predicted labels into metrics; None if tokens are predicted."""
  if feed.examples is None or feed.examples.kind == "chat":
    return None
  examples = feed.validation.examples

  def score_all(chosen, scores):
    predictions, references = examples.scored(chosen, scores)
    return score_predictions(
      examples.kind, predictions, references, examples.label_names
    )

  return score_all
