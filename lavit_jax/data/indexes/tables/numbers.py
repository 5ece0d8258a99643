"""Numbers the rows of several tables, and what is in them.

Of a hundred million rows a few numbers each are held.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


class Counts:
  """Numbers of things of each row; finds the row of thing i.

  Attributes:
    total: number of all things.
  """

  def __init__(self, counts: np.ndarray) -> None:
    """Takes the number of things of each row, uint[n]."""
    self.total = int(counts.sum(dtype=np.int64))
    self._ends: np.ndarray | None = None  # where no row or each has one
    if self.total and (self.total != len(counts) or counts.max() > 1):
      small = self.total < 1 << 32
      self._ends = np.cumsum(counts, dtype=np.uint32 if small else np.int64)

  def start(self, row: int) -> int:
    """Returns the number of the first thing of a row."""
    if self._ends is None:
      return row if self.total else 0
    return int(self._ends[row - 1]) if row else 0

  def find(self, i: int) -> tuple[int, int]:
    """Returns (row of thing i, its number in the row).

    Raises:
      IndexError: there is no thing i.
    """
    if not 0 <= i < self.total:
      raise IndexError(f"{i} is not among {self.total}")
    if self._ends is None:
      return int(i), 0
    row = int(np.searchsorted(self._ends, i, side="right"))
    return row, int(i) - self.start(row)

  def add_to(self, digest: Any) -> None:
    """Adds the numbers to a digest."""
    digest.update(repr(self.total).encode())
    if self._ends is not None:
      digest.update(self._ends.tobytes())


class Places:
  """Where each of the rows of all tables is.

  Attributes:
    starts: int64[t + 1], number of the first row of each table, and of all.
  """

  def __init__(
    self, names: Sequence[str], blocks: Sequence[np.ndarray]
  ) -> None:
    """Takes the name of each table, and the rows of each of its blocks."""
    self._names = names
    self._rows = np.cumsum(np.concatenate([[0], *blocks]), dtype=np.int64)
    self._blocks = np.cumsum([0, *(len(some) for some in blocks)])
    self.starts = self._rows[self._blocks]

  def find(self, row: int) -> tuple[int, int, int]:
    """Returns (table, block, number in it) of a row."""
    block = int(np.searchsorted(self._rows, row, side="right")) - 1
    table = int(np.searchsorted(self._blocks, block, side="right")) - 1
    return table, block - int(self._blocks[table]), row - int(self._rows[block])

  def name(self, row: int) -> str:
    """Returns the name of a row: its table, and its number in that."""
    table, _, _ = self.find(row)
    return f"{self._names[table]}:{row - int(self.starts[table])}"
