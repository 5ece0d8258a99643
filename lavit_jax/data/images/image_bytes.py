"""Fingerprints the images of a source by some of their bytes.

`examples.fingerprint` covers only the names of images, which may be the same
in two folders.
"""

import concurrent.futures
import hashlib
import os

import numpy as np

from lavit_jax.core import errors, image_io
from lavit_jax.core.storage import fetched, files
from lavit_jax.data import examples

_IMAGES_HASHED = 16  # evenly spread, the first and the last among them
_BYTES_HASHED = 1 << 16  # of each, from its start
_THREADS = 8


def of(source: examples.Source) -> str:
  """Returns a hex digest of the sizes and first bytes of some images.

  Costs 16 small reads, also from an object store. A source with `stored` adds
  which files its images are in.

  Returns:
    The digest; "" for a source whose images are computed.

  Raises:
    errors.DataError: an object store fails.
  """
  if not isinstance(source, examples.HasEncodedImages):
    return ""
  count = min(source.num_images, _IMAGES_HASHED)
  numbers = np.linspace(0, source.num_images - 1, count).astype(int).tolist()
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    starts = list(pool.map(lambda i: _start_in(source, i), numbers))
  if None in starts:
    return ""
  storage = source.stored() if isinstance(source, examples.HasStorage) else ""
  return hashlib.sha256(repr((storage, starts)).encode()).hexdigest()[:32]


def _start_in(source, i):
  try:
    return _start_of(source.encoded(i))
  except image_io.ImageError:
    return "unreadable"  # likewise


def _start_of(image):
  """Returns (size, digest of the first bytes) of an image.

  "missing" or "unreadable" stand for a file that is so; None for an image that
  is neither bytes nor a file.
  """
  if isinstance(image, (bytes, bytearray, memoryview)):
    return len(image), _digest(image[:_BYTES_HASHED])
  if not isinstance(image, (str, os.PathLike)):
    return None
  path = files.input_path(image)
  try:
    length = path.stat().length if files.is_remote(path) else os.stat(path)[6]
    stop = min(length, _BYTES_HASHED)
    return length, _digest(fetched.read_range(path, 0, stop))
  except FileNotFoundError:
    return "missing"
  except (OSError, ValueError) as error:
    if files.is_remote(path):
      raise errors.DataError(
        f"{path} could not be read ({error}), so caches cannot be checked"
        " against these images. Run the same command again."
      ) from error
    return "unreadable"  # it is skipped and logged when it is decoded


def _digest(data):
  return hashlib.sha256(data).hexdigest()
