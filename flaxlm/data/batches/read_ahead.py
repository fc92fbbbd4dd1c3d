"""Makes batches ahead of the training loop, in threads or with tf.data."""

import collections
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from flaxlm.errors import ConfigError


def read_ahead(
  batches, steps: range, loader: str, num_threads: int, prefetch: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches[t] for t in `steps`, in order, several of them made at once.

  Args:
    batches: its items are dicts of int32 arrays, one of them "tokens", all with the
      same keys.
    loader: "tfdata", or "numpy": threads, without TensorFlow. Both yield the same bits.
    prefetch: how many batches may wait to be used.

  Raises:
    ConfigError: the loader is unknown or needs TensorFlow, which is not installed.
  """
  if loader == "tfdata":
    return _read_with_tfdata(batches, steps, num_threads, prefetch)
  elif loader == "numpy":
    return _read_with_threads(batches, steps, num_threads, prefetch)
  raise ConfigError("config.data.loader", loader, "tfdata or numpy")


def one_ahead(items: Iterator) -> Iterator:
  """Yields `items`; a thread makes the next one while the current one is used."""
  end = object()
  with _workers(1) as pool:
    coming = pool.submit(next, items, end)
    while (item := coming.result()) is not end:
      coming = pool.submit(next, items, end)
      yield item


@contextlib.contextmanager
def _workers(num_threads: int) -> Iterator[ThreadPoolExecutor]:
  """Yields a pool that is not waited for at the end: its threads only read."""
  pool = ThreadPoolExecutor(num_threads, "batches")
  try:
    yield pool
  finally:
    pool.shutdown(wait=False)


def _read_with_threads(batches, steps, num_threads, prefetch):
  with _workers(num_threads) as pool:
    ready = collections.deque()
    for step in steps:
      ready.append(pool.submit(batches.__getitem__, step))
      if len(ready) > prefetch:
        yield ready.popleft().result()
    while ready:
      yield ready.popleft().result()


def _read_with_tfdata(batches, steps, num_threads, prefetch):
  from flaxlm.data.lazy_tensorflow import import_tensorflow

  try:
    tf = import_tensorflow()
  except ImportError as error:
    raise ConfigError(
      "config.data.loader",
      f"tfdata, but {error}",
      "tensorflow-cpu installed, or a loader without it",
      "numpy (the same batches)",
    ) from error
  if not len(steps):
    return
  first = batches[steps.start]  # shows the names of the arrays
  names, errors = list(first), []

  def read(step):
    try:
      batch = batches[int(step)]
    except Exception as error:  # tf.data would print it and keep only its text
      errors.append(error)
      return [np.empty((0, 0), np.int32)] * len(names)
    return [batch[name] for name in names]

  def load(step):
    types = [tf.int32] * len(names)
    arrays = tf.numpy_function(read, [step], types, stateful=False)
    return dict(zip(names, arrays, strict=True))

  dataset = tf.data.Dataset.range(steps.start + 1, steps.stop)
  dataset = dataset.map(load, num_parallel_calls=num_threads, deterministic=True)
  options = tf.data.Options()
  options.autotune.enabled = False
  options.threading.private_threadpool_size = num_threads
  dataset = dataset.prefetch(prefetch).with_options(options)
  yield first
  for batch in dataset.as_numpy_iterator():
    if not batch["tokens"].size:
      raise errors[0]
    yield batch
