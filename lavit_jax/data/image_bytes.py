"""Which images a source has, told by some of their bytes.

`examples.fingerprint` knows them by their names, which two folders may share.
"""

import concurrent.futures
import hashlib
import os

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import fetched, files

_LOOKED_AT = 16  # images, evenly spread, the first and the last among them
_FIRST = 1 << 16  # bytes of each
_AT_ONCE = 8  # images read


def of(source) -> str:
  """Hex digest of sizes and first bytes of some images; "" if it has none.

  So it costs 16 small reads, of an object store too. A source whose images
  are computed has no bytes, and one that knows more about where its images
  lie tells it by `stored`.

  Raises:
    errors.DataError: an object store fails.
  """
  if not hasattr(source, "encoded"):
    return ""
  count = min(source.num_images, _LOOKED_AT)
  numbers = np.linspace(0, source.num_images - 1, count).astype(int).tolist()
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    seen = list(pool.map(lambda i: _seen(source, i), numbers))
  if None in seen:
    return ""
  told = source.stored() if hasattr(source, "stored") else ""
  return hashlib.sha256(repr((told, seen)).encode()).hexdigest()[:32]


def _seen(source, i):
  """(size, digest of the first bytes) of image i; None: it has no bytes."""
  image = source.encoded(i)
  if isinstance(image, (bytes, bytearray, memoryview)):
    return len(image), _digest(image[:_FIRST])
  if not isinstance(image, (str, os.PathLike)):
    return None
  path = files.place(image)
  try:
    length = path.stat().length if files.is_remote(path) else os.stat(path)[6]
    return length, _digest(fetched.read_range(path, 0, min(length, _FIRST)))
  except FileNotFoundError:
    return "missing"
  except (OSError, ValueError) as error:
    if files.is_remote(path):
      raise errors.DataError(
        f"{path} could not be read ({error}), so that caches cannot be held to"
        " these images. Give the same command again."
      ) from error
    return "unreadable"  # as it is to whoever decodes it


def _digest(data):
  return hashlib.sha256(data).hexdigest()
