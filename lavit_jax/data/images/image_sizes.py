"""Reads the sizes of a source's images."""

import concurrent.futures

import numpy as np

from lavit_jax.core import image_io
from lavit_jax.data import examples

_THREADS = 8  # that read headers
_CHUNK = 4096  # images that are looked at together


def of(source: examples.Source) -> np.ndarray:
  """Returns heights and widths of a source's images, int32[num_images, 2].

  Decodes only the headers; (0, 0) stands for an image that cannot be read. Of a
  source without `encoded`, which has only squares, nothing is read.
  """
  if not isinstance(source, examples.HasEncodedImages):
    return np.full((source.num_images, 2), source.image_size, np.int32)

  def size_of(i):
    try:
      return image_io.size_of(source.encoded(i), name=source.image_key(i))
    except image_io.ImageError:
      return 0, 0  # logged by whoever makes the rows

  sizes = np.zeros((source.num_images, 2), np.int32)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for start in range(0, len(sizes), _CHUNK):  # `map` submits all at once
      some = range(start, min(start + _CHUNK, len(sizes)))
      sizes[some.start : some.stop] = list(pool.map(size_of, some))
  return sizes
