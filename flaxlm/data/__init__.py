"""Text to tokens to rows to batches: sources, tokenizer, store, batches.

TensorFlow, TFDS, SentencePiece and pyarrow are imported in this room only, and lazily:
a prepared store is read with numpy alone.
"""

import contextlib
import os
import sys
import tempfile

from flaxlm.errors import UserError


def import_tensorflow():
  """Imports TensorFlow, kept away from accelerators: JAX owns their memory."""
  if "tensorflow" in sys.modules:
    tf = sys.modules["tensorflow"]
  else:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with quiet_stderr():
      import tensorflow as tf

      tf.config.set_visible_devices([], "GPU")
      tf.config.set_visible_devices([], "TPU")
      tf.zeros(()).numpy()  # the first operation logs too
  return tf


@contextlib.contextmanager
def quiet_stderr():
  """Holds back what C++ libraries write to stderr; shows it if an exception follows.

  Some of it (absl before it is initialised, for one) obeys no log level.
  """
  sys.stderr.flush()
  saved = os.dup(2)
  with tempfile.TemporaryFile() as held:
    os.dup2(held.fileno(), 2)
    try:
      yield
    except UserError:  # says itself what was wrong
      raise
    except BaseException:
      held.seek(0)
      os.write(saved, held.read()[-4000:])
      raise
    finally:
      os.dup2(saved, 2)
      os.close(saved)
