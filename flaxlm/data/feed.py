"""Opens the data of a config and puts its batches on the devices, ahead of the step.

The data is a token store, labelled examples (config.task) or random tokens. Each
process makes only the rows that its own devices hold.
"""

import dataclasses
import os
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from flaxlm.data.batches import masking, token_frequencies
from flaxlm.data.batches.packed import Batches
from flaxlm.data.batches.read_ahead import one_ahead, read_ahead
from flaxlm.data.batches.synthetic import SyntheticBatches
from flaxlm.data.store.shards import Store
from flaxlm.data.tasks.examples import (
  IN_TRAINING_TOO,
  ExampleBatches,
  Examples,
  load_examples,
)
from flaxlm.data.tasks.labels import Labels
from flaxlm.errors import ConfigError
from flaxlm.kernels.attention.choice import CONTEXT_PARALLEL
from flaxlm.kernels.attention.ring import zigzag
from flaxlm.parallel.placement import (
  batch_sharding,
  check_batch_size,
  local_rows,
  to_global,
)
from flaxlm.tokenizer.chat_template import ChatTemplate, open_template
from flaxlm.tokenizer.files import load_tokenizer


class Feed:
  """The training and validation batches of a run.

  `train[t]` and `validation[t]` are this process's rows of batch t, in numpy.
  `validation` is None if no data is held out; `train` is None if labelled examples are
  only evaluated. The groups of the config are read and never changed.
  """

  # What a run keeps with its checkpoints. The defaults are those of random tokens.
  fingerprint: str = "synthetic"  # of the data: a run continues only with the same data
  tokenizer: bytes = b""
  tokenizer_sha256: str = ""
  store: Store | None = None
  examples: Examples | None = None  # of the training split, or else the validation one
  chat_template: ChatTemplate | None = None

  def __init__(
    self,
    data: ConfigDict,
    objective: ConfigDict,
    task: ConfigDict,
    model: ConfigDict,
    mesh_knobs: ConfigDict,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    accumulation_steps: int = 1,
    eval_batches: int = 0,
    tokenizer_path: str | os.PathLike = "",
    template_path: str = "",
    training: bool = True,
    labels: Labels | None = None,
  ):
    """Opens the data that the groups of a config name.

    Args:
      eval_batches: batches per evaluation; 0 = all.
      tokenizer_path: the model's tokenizer, for labelled examples. A token store has
        its own.
      template_path: the model's chat template; "" = that of task.chat_template.
      training: False opens labelled examples for validation only.
      labels: the classes of labelled examples; None = those of task.labels.

    Raises:
      ConfigError: the batch does not divide over the mesh, or the vocabulary is too
        small.
      MissingInputError, DataError: the data is missing or damaged.
    """
    check_batch_size(data.batch_size, accumulation_steps, mesh_knobs, mesh)
    self.data, self.task, self.model = data, task, model
    self.template_path = template_path or task.chat_template
    self.objective = masking.Objective(**objective)
    self.sharding = batch_sharding(mesh_knobs.rules.to_dict(), mesh)
    self.first_row, stop = local_rows(self.sharding, data.batch_size)
    self.shape = {
      "seq_len": data.seq_len,
      "batch_size": data.batch_size,
      "seed": seed,
      "vocab_size": model.vocab_size,
      "first_row": self.first_row,
      "num_rows": stop - self.first_row,
    }
    self.column_order = None
    if model.attention == CONTEXT_PARALLEL and mesh.shape["context"] > 1:
      self.column_order = zigzag(data.seq_len, mesh.shape["context"])
    if task.kind != "none":
      self._open_examples(tokenizer_path, training, labels)
    elif data.loader == "synthetic":
      self._open_synthetic()
    elif data.loader in ("tfdata", "numpy"):
      self._open_store()
    else:
      raise ConfigError("config.data.loader", data.loader, "tfdata, numpy or synthetic")
    available = len(self.validation) if self.validation is not None else 0
    self.num_eval_batches = min(eval_batches or available, available)

  def _open_synthetic(self) -> None:
    vocabulary = None
    if self.objective.kind != "causal":
      vocabulary = masking.synthetic_vocabulary(self.objective, self.model.vocab_size)
    self.train, self.validation = (
      SyntheticBatches(**self.shape, objective=self.objective, vocabulary=vocabulary),
      None,
    )

  def _open_store(self) -> None:
    self.store = store = Store(self.data.store)
    self.fingerprint = store.fingerprint
    self.tokenizer, self.tokenizer_sha256 = store.tokenizer, store.tokenizer_sha256
    self._check_vocabulary(store.vocab_size, f"the tokenizer in {store.path}")
    vocabulary = None
    if self.objective.kind != "causal":
      special, controls = masking.special_ids(store)
      vocabulary = masking.make_vocabulary(
        self.objective, self.model.vocab_size, store.vocab_size,
        special, controls, store.continues_word,
      )  # fmt: skip
    self.train = self._make_batches("train", vocabulary)
    self.validation = self._make_batches("validation", vocabulary)

  def _make_batches(
    self, split: str, vocabulary: masking.Vocabulary | None
  ) -> Batches | None:
    """Returns the batches of a split; validation is read in order, None if empty."""
    streams = {name: self.store.stream(name, split) for name in self.data.sources}
    in_order = split == "validation"
    if in_order:
      streams = {name: stream for name, stream in streams.items() if stream.num_tokens}
    if not streams:
      return None
    weights = [self.data.sources[name].weight for name in streams]
    return Batches(
      streams, weights, **self.shape, pad_id=self.store.pad_id, in_order=in_order,
      objective=self.objective, vocabulary=vocabulary,
    )  # fmt: skip

  def _open_examples(
    self, tokenizer_path: str | os.PathLike, training: bool, labels: Labels | None
  ) -> None:
    if not tokenizer_path:
      raise ConfigError(
        "config.tokenizer.path", "''", "the tokenizer of the model to fine-tune",
        "config.init_from=RUN, which brings its own",
      )  # fmt: skip
    data, task, model = self.data, self.task, self.model
    tokenizer = load_tokenizer(tokenizer_path)
    self.tokenizer, self.tokenizer_sha256 = tokenizer.model, tokenizer.sha256
    self._check_vocabulary(tokenizer.vocab_size, f"the tokenizer {tokenizer_path}")
    if task.kind == "chat":
      self.chat_template = open_template(self.template_path, tokenizer)
    train, validation = load_examples(
      task, tokenizer, data.seq_len, causal=model.causal,
      validation_fraction=data.validation_fraction, num_threads=data.num_threads,
      chat_template=self.chat_template, training=training, labels=labels,
    )  # fmt: skip
    self.examples = train or validation
    self.fingerprint = self.examples.fingerprint
    classes = len(self.examples.label_names)
    if task.kind in ("classify", "tag") and classes != model.num_labels:
      raise ConfigError(
        "config.model.num_labels", model.num_labels,
        f"{classes}, the classes of config.task.path={task.path}", f"{classes}",
      )  # fmt: skip
    pad_id = max(tokenizer.pad_id, 0)
    self.train = train and ExampleBatches(train, **self.shape, pad_id=pad_id)
    self.validation = validation and ExampleBatches(
      validation, **self.shape, pad_id=pad_id, in_order=True
    )

  def _check_vocabulary(self, needed: int, of: str) -> None:
    if needed > self.model.vocab_size:
      raise ConfigError(
        "config.model.vocab_size", self.model.vocab_size,
        f"at least the {needed} of {of}", f"{-(-needed // 64) * 64}",
      )  # fmt: skip

  def describe(self, num_steps: int) -> tuple[str, float | None]:
    """Returns a description of the training data, and how many epochs the steps are."""
    rows = num_steps * self.data.batch_size
    if self.examples is not None:
      count = len(self.examples)
      text = f"{self.task.path}: {count:,} rows to {self.task.kind}"
      if names := self.examples.label_names:
        text += f", {len(names)} classes: {' '.join(names[:8])}"
        text += " ..." * (len(names) > 8)
      for problem, times in self.examples.problems.items():
        text += f"; {'warning: ' * (problem == IN_TRAINING_TOO)}{times:,} {problem}"
      return text, rows / count
    if self.store is None:
      return "synthetic tokens", None
    tokens = sum(stream.num_tokens for stream in self.train.streams.values())
    names = " + ".join(self.data.sources)
    text = f"{self.data.store}: {names}, {tokens:,} training tokens"
    return text, rows / sum(self.train.rows_per_source)

  def bytes_per_token(self) -> float | None:
    """Returns that of the validation text; None unless each token is predicted once."""
    if self.examples is not None:
      return None
    return token_frequencies.bytes_per_token(self.validation)

  def read_train(
    self, first_step: int, num_steps: int, rows_read: int | None = None
  ) -> Iterator[dict]:
    """Yields the batches (dicts of jax.Array) of steps first_step to num_steps - 1.

    Args:
      rows_read: rows that came before these batches. Steps before them may have had
        another batch size; None means that they had this one.
    """
    batches, size = self.train, self.data.batch_size
    shift = 0 if rows_read is None else rows_read - first_step * size
    if shift and not isinstance(batches, SyntheticBatches):  # those have no epochs
      batches = dataclasses.replace(batches, first_row=batches.first_row + shift)
    return self._read(batches, range(first_step, num_steps))

  def read_validation(self) -> Iterator[dict]:
    """Yields the batches of one evaluation, the same ones each time."""
    return self._read(self.validation, range(self.num_eval_batches))

  def _read(self, batches, steps: range) -> Iterator[dict]:
    data = self.data
    # tf.data helps to read files; all other batches are made in memory.
    loader = data.loader if self.store else "numpy"

    def place(rows: dict) -> dict[str, jax.Array]:
      if self.column_order is not None:
        rows = {name: row[:, self.column_order] for name, row in rows.items()}
      return to_global(rows, self.first_row, data.batch_size, self.sharding)

    rows = read_ahead(batches, steps, loader, data.num_threads, data.prefetch)
    return one_ahead(map(place, rows))
