"""From `config.data` to arrays on the devices: a run's batches, ready to compute on."""

from collections.abc import Iterator

import jax
from jax.sharding import NamedSharding

from flaxlm.data.batches import Batches, SyntheticBatches, read_ahead
from flaxlm.data.store import Store
from flaxlm.errors import ConfigError
from flaxlm.parallel import hosts
from flaxlm.parallel.sharding import spec


class Feed:
  """The training and validation batches of a config, and this host's part of them.

  Raises:
    ConfigError: the batch does not divide over the mesh; the vocabulary is too small.
    MissingInputError, DataError: the token store is not there, or is damaged.
  """

  def __init__(self, config, mesh: jax.sharding.Mesh, rules: dict):
    self.config = config
    data, vocab_size = config.data, config.model.vocab_size
    self.sharding = NamedSharding(mesh, spec(("batch",), rules))
    ways = mesh.size // mesh.shape["tensor"] * config.step.accumulation_steps
    if data.batch_size % ways:
      raise ConfigError(
        "config.data.batch_size",
        data.batch_size,
        f"a multiple of {ways} = devices on (data, fsdp) x accumulation_steps",
        f"{-(-data.batch_size // ways) * ways}",
      )
    self.first_row, stop = hosts.local_rows(self.sharding, data.batch_size)
    part = {"first_row": self.first_row, "num_rows": stop - self.first_row}
    self.store, self.validation = None, None
    self.fingerprint, self.tokenizer_sha256 = "synthetic", ""
    if data.loader == "synthetic":
      self.train = SyntheticBatches(
        data.seq_len, data.batch_size, config.seed, vocab_size, **part
      )
      return
    self.store = Store(data.store)
    self.fingerprint = self.store.fingerprint
    self.tokenizer_sha256 = self.store.tokenizer_sha256
    if self.store.vocab_size > vocab_size:
      needed = self.store.vocab_size
      raise ConfigError(
        "config.model.vocab_size",
        vocab_size,
        f"at least the {needed} of the tokenizer in {data.store}",
        f"{-(-needed // 64) * 64}",
      )
    self.train = self._open("train", part)
    self.validation = self._open("validation", part)

  def _open(self, split: str, part: dict) -> Batches | None:
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
      **part,
    )

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
    for rows in read_ahead(batches, steps, loader, data.num_threads, data.prefetch):
      yield hosts.to_global(rows, self.first_row, data.batch_size, self.sharding)
