"""Reads single values of a column of bytes, without the rest of a row group.

PyArrow decodes row groups as a whole, and those of images have a hundred
megabytes or more. The values of a row group are in pages of about one: here
the heads of these are read, then of each value only its page.

Only what writers of images do is understood: pages of both versions, plain or
with a dictionary, of common compressions, in a column without lists. Of all
else, and of what looks damaged, `thrift.Odd` is raised: PyArrow is asked then.

The format: https://parquet.apache.org/docs/file-format.
"""

import bisect
import dataclasses
import struct
import zlib
from typing import Any

import numpy as np

from lavit_jax.data.indexes.tables import arrow, tables
from lavit_jax.data.indexes.tables.parquet import footer, thrift

_HEAD = 512  # bytes in which the head of a page is looked for at first
_MOST_HEAD = 1 << 20
# PyArrow looks at the size of a page every 1024 values only: a row group of
# images is often one page.
_LARGE = 4 << 20  # bytes of a page of which values are read one by one
_FAR = 4096  # bytes of a value whose length is read alone
_CODECS = {0: None, 1: "snappy", 2: "gzip", 6: "zstd"}
_WANTED = {
  **dict.fromkeys((1, 2, 3, 4)),
  5: dict.fromkeys((1, 2, 3)),
  7: dict.fromkeys((1, 2)),
  8: dict.fromkeys((1, 4, 5, 6, 7)),
}
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # kinds of pages
_PLAIN, _OLD_INDEX, _RUNS, _INDEX = 0, 2, 3, 8  # encodings


@dataclasses.dataclass(frozen=True)
class _Page:
  """A page of values.

  Attributes:
    kind: _DATA, _DATA_2 or _DICTIONARY.
    start: of its data in the file.
    size: of its data there, and unpacked.
    count: number of its values, nulls included.
    encoding: of the values.
    levels: of a _DATA_2, bytes of the levels, which are not packed.
    packed: whether the rest is.
    crc: checksum of the data, None if it has none.
  """

  kind: int
  start: int
  size: tuple[int, int]
  count: int
  encoding: int
  levels: int
  packed: bool
  crc: int | None


class Pages:
  """The values of one column of a row group.

  Several threads may read of it at once.

  Attributes:
    nbytes: that it may take in memory.
  """

  def __init__(
    self, file: tables.Bytes, chunk: footer.Chunk, levels: int
  ) -> None:
    """Reads the heads of the pages.

    Args:
      file: to read of.
      chunk: where they are.
      levels: level of a value that is not null.

    Raises:
      thrift.Odd: see above.
      OSError: the file cannot be read, or has changed.
    """
    if chunk.kind != footer.BYTES or chunk.codec not in _CODECS:
      raise thrift.Odd("kind of values")
    self._file, self._levels = file, levels
    self._codec, self._most = _CODECS[chunk.codec], chunk.size[1]
    self._pages: list[_Page] = []
    self._dictionary: list[bytes] = []
    self._firsts: list[int] = []  # number of the first value of each page
    self._read_heads(chunk.start, chunk.start + chunk.size[0], chunk.count)
    self._recent: tuple[int, list[Any]] | None = None
    self._places: dict[int, np.ndarray] = {}  # of values of large pages
    whole = [page.size[1] for page in self._pages if not self._is_large(page)]
    self.nbytes = 3 * max(whole, default=0) + 16 * chunk.count
    self.nbytes += sum(map(len, self._dictionary))

  def _read_heads(self, at, stop, count):
    """Finds the pages between two places of the file."""
    seen = 0
    while at < stop and seen < count:
      page, at = self._head(at, stop)
      if page.kind == _DICTIONARY:
        if self._dictionary or page.encoding not in (_PLAIN, _OLD_INDEX):
          raise thrift.Odd("dictionary")
        self._dictionary = _plain(self._data(page), page.count)
      elif page.kind in (_DATA, _DATA_2):
        if page.encoding not in (_PLAIN, _OLD_INDEX, _INDEX):
          raise thrift.Odd("encoding")
        if self._is_large(page) and not self._is_open(page):
          raise thrift.Odd("a large page that is packed")
        self._pages.append(page)
        self._firsts.append(seen)
        seen += page.count
    if seen != count:
      raise thrift.Odd("number of values")

  def _is_large(self, page):
    return page.size[1] > _LARGE

  def _is_open(self, page):
    """Whether the values of a page are in the file as they are."""
    packed = self._codec is not None and page.packed
    return page.encoding == _PLAIN and not packed

  def _head(self, at, stop) -> tuple[_Page, int]:
    """Returns a page, and where the next one begins."""
    size = _HEAD
    while True:
      data = self._file.read(at, min(at + size, stop))
      try:
        fields, length = thrift.record(data, 0, _WANTED)
        break
      except IndexError as error:
        if size >= _MOST_HEAD or len(data) < size:
          raise thrift.Odd("head of a page") from error
        size *= 8
    page = _page(fields, at + length)
    end = page.start + page.size[0]
    if end > stop or page.size[1] > self._most or page.levels > page.size[1]:
      raise thrift.Odd("size of a page")
    return page, end

  def _data(self, page) -> bytes:
    """Returns the data of a page, unpacked."""
    data = self._file.read(page.start, page.start + page.size[0])
    if len(data) != page.size[0]:
      raise thrift.Odd("end of the file")
    if page.crc is not None and zlib.crc32(data) != page.crc:
      raise thrift.Odd("checksum of a page")
    if self._codec is None or not page.packed:
      return data
    plain, packed = data[: page.levels], data[page.levels :]
    size = page.size[1] - page.levels
    if not size:
      return plain
    library = arrow.library()
    try:
      out = library.decompress(packed, size, codec=self._codec, asbytes=True)
    except (library.ArrowException, OSError, ValueError) as error:
      raise thrift.Odd("packed data") from error
    return plain + out

  def value(self, number: int) -> bytes | None:
    """Returns a value, None if it is null.

    Raises:
      thrift.Odd: see above.
      OSError: the file cannot be read, or has changed.
    """
    which = bisect.bisect_right(self._firsts, number) - 1
    if self._is_large(self._pages[which]):
      return self._lone(which, number - self._firsts[which])
    recent = self._recent
    if recent is None or recent[0] != which:
      recent = which, self._values(self._pages[which])
      self._recent = recent
    return recent[1][number - self._firsts[which]]

  def _lone(self, which, k) -> bytes | None:
    """Returns a value of a large page, and reads no other one."""
    places = self._places.get(which)
    if places is None:
      places = self._places_of(self._pages[which])
      self._places[which] = places
    start, stop = places[k].tolist()
    return self._file.read(start, stop) if start else None

  def _places_of(self, page) -> np.ndarray:
    """Returns where each value of a page begins and ends, zeros of nulls.

    Each follows its length, so that from one the next is found.
    """
    stop = page.start + page.size[0]
    data, at = self._file.read(page.start, page.start + page.levels), page.start
    if page.kind == _DATA_2:
      levels, at = data, at + page.levels
    elif self._levels:
      size = _length(self._file.read(at, at + 4), 0)
      levels = self._file.read(at + 4, min(at + 4 + size, stop))
      at += 4 + size
    there = self._there(page, levels if self._levels else b"")
    places = np.zeros((page.count, 2), np.int64)
    # Of small values many lengths are read at once.
    ahead = 4 if page.size[0] > _FAR * page.count else 1 << 16
    begin, data = at, b""
    for k in np.flatnonzero(there).tolist():
      if not begin <= at <= begin + len(data) - 4:
        begin, data = at, self._file.read(at, min(at + ahead, stop))
      size = _length(data, at - begin)
      places[k] = at + 4, at + 4 + size
      at += 4 + size
      if at > stop:
        raise thrift.Odd("end of a page")
    return places

  def _there(self, page, levels) -> np.ndarray:
    """Returns which values are not null, bool[count]."""
    if not self._levels:
      return np.ones(page.count, bool)
    width = self._levels.bit_length()
    return _numbers(levels, width, page.count) == self._levels

  def _values(self, page) -> list[bytes | None]:
    """Returns all values of a page."""
    data, levels, at = self._data(page), b"", 0
    if page.kind == _DATA_2:
      levels, at = data[: page.levels], page.levels
    elif self._levels:
      size = _length(data, 0)
      levels, at = data[4 : 4 + size], 4 + size
    there = self._there(page, levels)
    found = self._found(page, data[at:], int(there.sum()))
    values = iter(found)
    return [next(values) if here else None for here in there.tolist()]

  def _found(self, page, data, count) -> list[bytes]:
    """Returns the values of a page that are not null."""
    if page.encoding == _PLAIN:
      return _plain(data, count)
    if not count:
      return []
    try:
      numbers = _numbers(data[1:], data[0], count).tolist()
      return [self._dictionary[number] for number in numbers]
    except IndexError as error:
      raise thrift.Odd("dictionary") from error


def _page(fields, start) -> _Page:
  """Returns a page from the fields of its head."""
  try:
    kind, unpacked, packed = fields[1], fields[2], fields[3]
    crc = fields.get(4)
    inner = fields.get({_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}.get(kind, 0), {})
    levels, is_packed = 0, True
    if kind == _DATA_2:
      count, encoding = inner[1], inner[4]
      levels, is_packed = inner[5], inner.get(7, True)
      if inner[6]:
        raise thrift.Odd("lists")
    elif kind in (_DATA, _DICTIONARY):
      count, encoding = inner[1], inner[2]
      if kind == _DATA and inner[3] != _RUNS:
        raise thrift.Odd("encoding of levels")
    else:
      count, encoding = 0, _PLAIN
  except KeyError as error:
    raise thrift.Odd("head of a page") from error
  whole = (kind, unpacked, packed, count, encoding, levels)
  if any(not isinstance(v, int) or v < 0 for v in whole):
    raise thrift.Odd("head of a page")
  size = packed, unpacked
  checksum = crc & 0xFFFFFFFF if isinstance(crc, int) else None
  return _Page(
    kind, start, size, count, encoding, levels, bool(is_packed), checksum
  )


def _length(data, at) -> int:
  try:
    return struct.unpack_from("<I", data, at)[0]
  except struct.error as error:
    raise thrift.Odd("end of a page") from error


def _plain(data, count) -> list[bytes]:
  """Returns values, each behind its length."""
  out, at = [], 0
  for _ in range(count):
    size = _length(data, at)
    at += 4 + size
    if at > len(data):
      raise thrift.Odd("end of a page")
    out.append(data[at - size : at])
  return out


def _numbers(data, width, count) -> np.ndarray:
  """Returns numbers of so many bits, in runs or packed: int64[count]."""
  out, done, at = np.zeros(count, np.int64), 0, 0
  if width > 32:
    raise thrift.Odd("bits")
  try:
    while done < count:
      head, at = thrift.varint(data, at)
      if head & 1:
        size = (head >> 1) * width
        some = np.frombuffer(data[at : at + size], np.uint8)
        bits = np.unpackbits(some, bitorder="little")
        bits = bits[: len(bits) // width * width] if width else bits
        shape = bits.reshape(-1, width) if width else np.zeros((count, 0))
        values = shape.astype(np.int64) @ (1 << np.arange(width))
      else:
        size = (width + 7) // 8
        value = int.from_bytes(data[at : at + size], "little")
        values = np.full(min(head >> 1, count), value, np.int64)
      at += size
      if not len(values):
        raise thrift.Odd("end of a page")
      values = values[: count - done]
      out[done : done + len(values)] = values
      done += len(values)
  except IndexError as error:
    raise thrift.Odd("end of a page") from error
  return out
