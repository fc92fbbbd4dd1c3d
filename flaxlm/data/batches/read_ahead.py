"""Reads batches ahead of the training loop, in threads or through tf.data."""

import collections
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from flaxlm.errors import ConfigError


def read_ahead(
  batches, steps: range, loader: str, num_threads: int, prefetch: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches[t] for t in `steps`, several prepared at once, in order.

  A batch is any dict of int32 arrays, with "tokens" among them and the same keys each
  time. loader "tfdata" uses tf.data; "numpy" uses threads and needs no TensorFlow. Both
  yield the same bits.
  """
  if loader == "tfdata":
    return _read_with_tfdata(batches, steps, num_threads, prefetch)
  return _read_with_threads(batches, steps, num_threads, prefetch)


def one_ahead(items: Iterator) -> Iterator:
  """Yields `items`; a thread of its own makes the next one while one is used."""
  end = object()
  with _workers(1) as pool:
    coming = pool.submit(next, items, end)
    while (item := coming.result()) is not end:
      coming = pool.submit(next, items, end)
      yield item


@contextlib.contextmanager
def _workers(num_threads: int) -> Iterator[ThreadPoolExecutor]:
  """Threads that nobody waits for in the end: they read, and leave nothing behind."""
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
  first = batches[steps.start]  # says which arrays there are
  names, errors = list(first), []

  def read(step):
    try:
      batch = batches[int(step)]
    except Exception as error:  # tf.data would print it and turn it into text
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
