"""Batches padded to a few sizes, so that each shape compiles once."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

SIZES = (1, 4, 16, 64)


def padded_size(count: int, sizes: Sequence[int] = SIZES) -> int:
  """Returns the smallest of the ascending sizes that holds `count`."""
  return next(size for size in sizes if size >= count)


def fill(rows: Any, size: int) -> Any:
  """Returns `size` rows of a list or an array; repeats the last row if few."""
  if isinstance(rows, list):
    return (rows + [rows[-1]] * size)[:size]
  rows = np.asarray(rows)[:size]
  last = np.repeat(rows[-1:], size - len(rows), axis=0)
  return np.concatenate([rows, last])


def chunks(
  rows: Any, limit: int = SIZES[-1], sizes: Sequence[int] = SIZES
) -> Iterator[tuple[Any, int, int]]:
  """Cuts a list or an array into padded chunks.

  Args:
    rows: a list, or an array with rows on its first axis.
    limit: largest chunk, at most the largest of the sizes.
    sizes: to which chunks are padded, ascending.

  Yields:
    (chunk, number of rows that are not padding, index of the first row).
  """
  for start in range(0, len(rows), limit):
    chunk = rows[start : start + limit]
    count = len(chunk)
    yield fill(chunk, min(padded_size(count, sizes), limit)), count, start
