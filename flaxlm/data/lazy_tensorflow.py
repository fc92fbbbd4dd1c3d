"""Imports TensorFlow, here only, and only when something needs it."""

import os
import sys

from flaxlm.machine import quiet_stderr


def import_tensorflow():
  """Returns TensorFlow, kept away from accelerators: JAX owns their memory."""
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
