"""Files at addresses (gs://, s3://), read through etils.epath."""

import contextlib
import os
from collections.abc import Iterator

from flaxlm import errors
from flaxlm.machine import quiet_stderr


def is_remote(address: str) -> bool:
  """Returns whether this is an address rather than a local path."""
  return "://" in address


def path(address: str | os.PathLike):
  """Returns the epath.Path of an address, or of a local file."""
  from etils import epath  # only remote files need it

  return epath.Path(address)


@contextlib.contextmanager
def reaching(address: str) -> Iterator[None]:
  """Turns any exception of the library that serves the address into a StorageError."""
  try:
    yield
  except Exception as error:
    reason = " ".join(str(error).split())[:300]
    raise errors.StorageError(
      f"{address} cannot be reached",
      f"{type(error).__name__}: {reason}",
      "a network, permission, and its library: TensorFlow or gcsfs for gs://",
    ) from None


def exists(address: str) -> bool:
  """Returns whether there is a file at `address`; StorageError if nobody can tell."""
  # Libraries log most at the first contact, which is here. Copies are not silenced:
  # they take long and run in threads, but stderr belongs to the whole process.
  with quiet_stderr(), reaching(address):
    return path(address).exists()
