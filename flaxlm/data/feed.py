"""From a config to arrays on the devices: a run's batches, ready to compute on.

A run reads rows of a token store, labelled examples (config.task), or random tokens.
"""

import math
import os
from collections.abc import Iterator

import jax

from flaxlm.data.batches import masking, word_frequencies
from flaxlm.data.batches.packed import Batches
from flaxlm.data.batches.read_ahead import one_ahead, read_ahead
from flaxlm.data.batches.synthetic import SyntheticBatches
from flaxlm.data.store.shards import Store
from flaxlm.data.tasks.examples import ExampleBatches, load_examples
from flaxlm.errors import ConfigError
from flaxlm.kernels.attention.ring import zigzag
from flaxlm.parallel import placement
from flaxlm.parallel.placement import batch_sharding
from flaxlm.tokenizer.chat_template import open_template
from flaxlm.tokenizer.files import load_tokenizer


class Feed:
  """The training and validation batches of a config, and this host's part of them.

  Raises:
    ConfigError: the batch does not divide over the mesh; the vocabulary is too small.
    MissingInputError, DataError: the token store is not there, or is damaged.
  """

  def __init__(
    self,
    config,
    mesh: jax.sharding.Mesh,
    tokenizer_path: str | os.PathLike = "",
    training: bool = True,
  ):
    """Opens what config.data and config.task name.

    Args:
      tokenizer_path: of the run, for labelled examples; a store has its own.
      training: False opens labelled examples for validation alone.
    """
    self.config = config
    data, vocab_size = config.data, config.model.vocab_size
    self.sharding = batch_sharding(config, mesh)
    ways = math.prod(mesh.shape[axis] for axis in config.mesh.rules.batch)
    ways *= config.step.accumulation_steps
    if mesh.shape["stage"] > 1:
      ways *= config.mesh.microbatches or mesh.shape["stage"]
    if data.batch_size % ways:
      raise ConfigError(
        "config.data.batch_size",
        data.batch_size,
        f"a multiple of {ways} = devices that split rows x accumulation_steps x "
        "microbatches of a pipeline",
        f"{-(-data.batch_size // ways) * ways}",
      )
    self.order = None  # of the places in a row
    if config.model.attention == "ring" and mesh.shape["context"] > 1:
      self.order = zigzag(data.seq_len, mesh.shape["context"])
    self.first_row, stop = placement.local_rows(self.sharding, data.batch_size)
    self.part = {"first_row": self.first_row, "num_rows": stop - self.first_row}
    self.store = self.validation = self.examples = self.chat_template = None
    self.fingerprint, self.tokenizer, self.tokenizer_sha256 = "synthetic", b"", ""
    self.objective = masking.Objective(**config.objective)
    if config.task.kind != "none":
      self._open_examples(tokenizer_path, training)
    elif data.loader == "synthetic":
      vocabulary = None
      if self.objective != masking.CAUSAL:
        vocabulary = masking.synthetic_vocabulary(self.objective, vocab_size)
      self.train = SyntheticBatches(
        data.seq_len, data.batch_size, config.seed, vocab_size, **self.part,
        objective=self.objective, vocabulary=vocabulary,
      )  # fmt: skip
    else:
      self._open_store()

  def _open_store(self) -> None:
    self.store = store = Store(self.config.data.store)
    self.fingerprint = store.fingerprint
    self.tokenizer, self.tokenizer_sha256 = store.tokenizer, store.tokenizer_sha256
    self._check_vocabulary(store.vocab_size, f"the tokenizer in {store.path}")
    self.vocabulary = None
    if self.objective.kind != "causal":
      special, controls = masking.special_ids(store)
      self.vocabulary = masking.make_vocabulary(
        self.objective, self.config.model.vocab_size, store.vocab_size,
        special, controls, store.continues_word,
      )  # fmt: skip
    self.train, self.validation = self._rows("train"), self._rows("validation")

  def _check_vocabulary(self, needed: int, of: str) -> None:
    if needed > self.config.model.vocab_size:
      raise ConfigError(
        "config.model.vocab_size",
        self.config.model.vocab_size,
        f"at least the {needed} of {of}",
        f"{-(-needed // 64) * 64}",
      )

  def _rows(self, split: str) -> Batches | None:
    """Validation is read in order, each row once; None if there is no such text."""
    data, in_order = self.config.data, split == "validation"
    streams = {name: self.store.stream(name, split) for name in data.sources}
    if in_order:
      streams = {name: stream for name, stream in streams.items() if stream.num_tokens}
    if not streams:
      return None
    return Batches(
      streams,
      [data.sources[name].weight for name in streams],
      data.seq_len,
      data.batch_size,
      self.config.seed,
      self.config.model.vocab_size,
      self.store.pad_id,
      in_order,
      **self.part,
      objective=self.objective,
      vocabulary=self.vocabulary,
    )

  def _open_examples(self, tokenizer_path, training: bool) -> None:
    config, data = self.config, self.config.data
    if not tokenizer_path:
      raise ConfigError(
        "config.tokenizer.path", "''", "the tokenizer of the model that is fine-tuned",
        "config.init_from=RUN, which brings its own",
      )  # fmt: skip
    tokenizer = load_tokenizer(tokenizer_path)
    self.tokenizer, self.tokenizer_sha256 = tokenizer.model, tokenizer.sha256
    self._check_vocabulary(tokenizer.vocab_size, f"the tokenizer {tokenizer_path}")
    if config.task.kind == "chat":
      self.chat_template = open_template(config.task.chat_template, tokenizer)
    splits = load_examples(
      config.task,
      tokenizer,
      data.seq_len,
      causal=config.model.causal,
      validation_fraction=data.validation_fraction,
      num_threads=data.num_threads,
      chat_template=self.chat_template,
      training=training,
    )
    self.examples = splits[0] or splits[1]
    self.fingerprint = self.examples.fingerprint
    labels = len(self.examples.label_names)
    if config.task.kind in ("classify", "tag") and labels != config.model.num_labels:
      raise ConfigError(
        "config.model.num_labels",
        config.model.num_labels,
        f"{labels}, the classes of config.task.path={config.task.path}",
        f"{labels}",
      )
    pad_id = max(tokenizer.pad_id, 0)
    self.train, self.validation = (
      examples
      and ExampleBatches(
        examples, data.seq_len, data.batch_size, config.seed,
        config.model.vocab_size, pad_id, in_order, **self.part,
      )
      for examples, in_order in zip(splits, (False, True), strict=True)
    )  # fmt: skip

  def describe(self) -> tuple[str, float | None]:
    """What is trained on in words, and the passes over it that the run makes."""
    config, data = self.config, self.config.data
    rows = config.num_steps * data.batch_size
    if self.examples is not None:
      count = len(self.examples)
      text = f"{config.task.path}: {count:,} rows to {config.task.kind}"
      if names := self.examples.label_names:
        text += f", {len(names)} classes"
      for problem, times in self.examples.problems.items():
        text += f"; {times:,} {problem}"
      return text, rows / count
    if self.store is None:
      return "synthetic tokens", None
    tokens = sum(stream.num_tokens for stream in self.train.streams.values())
    text = f"{data.store}: {' + '.join(data.sources)}, {tokens:,} training tokens"
    return text, rows / sum(self.train.rows_per_source)

  def bytes_per_token(self) -> float | None:
    """Of the validation text; None where not all of it is predicted."""
    if self.examples is not None:
      return None
    return word_frequencies.bytes_per_token(self.validation)

  @property
  def num_eval_batches(self) -> int:
    return min(self.config.eval.batches or len(self.validation), len(self.validation))

  def read_train(self, first_step: int) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches of steps first_step to num_steps, read ahead."""
    return self._read(self.train, range(first_step, self.config.num_steps))

  def read_validation(self) -> Iterator[dict[str, jax.Array]]:
    return self._read(self.validation, range(self.num_eval_batches))

  def _read(self, batches, steps: range) -> Iterator[dict[str, jax.Array]]:
    data = self.config.data
    loader = data.loader if self.store else "numpy"

    def place(rows):
      if self.order is not None:
        rows = {name: row[:, self.order] for name, row in rows.items()}
      return placement.to_global(rows, self.first_row, data.batch_size, self.sharding)

    rows = read_ahead(batches, steps, loader, data.num_threads, data.prefetch)
    return one_ahead(map(place, rows))
