"""Batches padded to a few sizes, so that each shape compiles once."""

from collections.abc import Iterator, Sequence

import numpy as np

SIZES = (1, 4, 16, 64)


def padded_size(count: int, sizes: Sequence[int] = SIZES) -> int:
  """The smallest of the sizes that holds `count`."""
  return next(size for size in sizes if size >= count)


def fill(rows, size: int):
  """The first `size` rows of a list or array, the last one repeated."""
  if isinstance(rows, list):
    return (rows + [rows[-1]] * size)[:size]
  rows = np.asarray(rows)[:size]
  last = np.repeat(rows[-1:], size - len(rows), axis=0)
  return np.concatenate([rows, last])


def chunks(
  rows, limit: int = SIZES[-1], sizes: Sequence[int] = SIZES
) -> Iterator[tuple]:
  """Cuts a list or an array into padded chunks.

  Args:
    rows: what is cut.
    limit: rows of a chunk at most, no more than the largest size.
    sizes: to which chunks are padded, from small to large.

  Yields:
    (chunk, how many of its rows are real, index of its first row).
  """
  for start in range(0, len(rows), limit):
    chunk = rows[start : start + limit]
    count = len(chunk)
    yield fill(chunk, min(padded_size(count, sizes), limit)), count, start
