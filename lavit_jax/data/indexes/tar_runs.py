"""Finds many plain files in a piece of a tar archive at once.

Most archives are long runs of plain ustar headers, which NumPy reads much
faster than a loop does (`benchmarks/tar_index.py`). A run ends before the first
header of another form: `tar_members` reads that one, and is what defines the
formats.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BLOCK = 512
_MARK = np.uint64(int.from_bytes(b"\0ustar\0\0", "little"))  # bytes 256 to 263
_MARK_MASK = np.uint64(0x0000FFFFFFFFFF00)
_POWERS = 8 ** np.arange(10, -1, -1, dtype=np.int64)
# Records of a pax header that say something of the next file which matters.
_MATTERS = (b" path=", b" size=")


class Run(NamedTuple):
  """Plain files, one after the other.

  Attributes:
    names: uint8[n, 100], paths in the archive; zeros follow the shorter ones.
    starts: int64[n], offsets of their first bytes.
    sizes: int64[n], in bytes.
    end: offset of what follows.
  """

  names: np.ndarray
  starts: np.ndarray
  sizes: np.ndarray
  end: int

  def part(self, start: int, stop: int) -> "Run":
    """Returns files start … stop - 1."""
    some = slice(start, stop)
    return self._replace(
      names=self.names[some], starts=self.starts[some], sizes=self.sizes[some]
    )

  def files(self) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, start, size) of each file."""
    names = np.ascontiguousarray(self.names).view("S100").ravel().tolist()
    for name, start, size in zip(
      names, self.starts.tolist(), self.sizes.tolist(), strict=True
    ):
      yield name.partition(b"\0")[0], start, size


def find(piece: bytes, at: int, length: int) -> Run:
  """Returns the run of plain files at the head of a piece; perhaps none.

  Args:
    piece: of the archive, beginning with a header.
    at: offset of the piece.
    length: of the archive: a file that is cut off ends the run.
  """
  count = len(piece) // _BLOCK
  blocks = np.frombuffer(piece, np.uint8, count * _BLOCK).reshape(count, _BLOCK)
  words = blocks.view(np.uint64)
  headers = np.flatnonzero((words[:, 32] & _MARK_MASK) == _MARK)
  found = blocks[headers]
  digits = found[:, 124:135] - np.uint8(ord("0"))
  sizes = digits.astype(np.int64) @ _POWERS
  kinds = found[:, 156]
  plain = (kinds == ord("0")) | (kinds == 0)
  pax = kinds == ord("x")
  # ustar has a prefix of the name; what GNU has there is no part of it.
  no_prefix = (found[:, 345] == 0) | (found[:, 262] != 0)
  ends = headers + 1 + (sizes + _BLOCK - 1) // _BLOCK  # the block that follows
  usual = (
    (digits < 8).all(axis=1)
    & (found[:, 135] == 0)
    & (at + (headers + 1) * _BLOCK + sizes <= length)
    & ((plain & no_prefix & (found[:, 0] != 0)) | (pax & (ends < count)))
  )
  chain, end = _follow(piece, headers, ends, usual, pax)
  starts = at + (headers[chain] + 1) * _BLOCK
  return Run(found[chain, :100], starts, sizes[chain], at + end * _BLOCK)


def _follow(piece, headers, ends, usual, pax):
  """Returns the numbers of the run's headers, and the block behind them.

  Only those to which the one before leads are headers: a file may hold others,
  such as those of an archive within it.
  """
  number_of = dict(zip(headers.tolist(), range(len(headers)), strict=True))
  ends, usual, pax = ends.tolist(), usual.tolist(), pax.tolist()
  chain: list[int] = []
  block = end = 0
  while (number := number_of.get(block)) is not None and usual[number]:
    after = ends[number]
    if pax[number]:
      records = piece[(block + 1) * _BLOCK : after * _BLOCK]
      if any(word in records for word in _MATTERS):
        break
      block = after
      continue
    chain.append(number)
    block = end = after
  return chain, end
