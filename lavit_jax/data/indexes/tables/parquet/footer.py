"""Reads what the end of a Parquet file says of its row groups.

Not by PyArrow: of a damaged end, its `ColumnChunkMetaData.statistics` aborts
the process (26.0.1: an exception of C++ that nobody catches).
"""

import dataclasses

from lavit_jax.data.indexes.tables import tables
from lavit_jax.data.indexes.tables.parquet import thrift

_TAIL = 8  # bytes: the length of the footer, and the magic
_OF_CHUNK = dict.fromkeys((1, 4, 5, 6, 7, 9, 11)) | {12: {3: None}}
_WANTED = {3: None, 4: {1: {3: _OF_CHUNK}, 3: None}}


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The values of one leaf of a row group.

  Attributes:
    kind: of the values, as Parquet numbers it; BYTES is one.
    codec: that they are packed with, as Parquet numbers it.
    count: number of the values, nulls included.
    start: of the first page in the file.
    size: of all pages there, and unpacked.
    nulls: number of the nulls, None if it is not noted.
  """

  kind: int
  codec: int
  count: int
  start: int
  size: tuple[int, int]
  nulls: int | None


@dataclasses.dataclass(frozen=True)
class Group:
  """A row group.

  Attributes:
    rows: number of its rows.
    chunks: of each leaf, None for one that is not described here.
  """

  rows: int
  chunks: tuple[Chunk | None, ...]


BYTES = 6


def data_of(file: tables.Bytes) -> bytes:
  """Returns the footer of a file, as it is there; b"" if there is none.

  Raises:
    OSError: the file cannot be read, or has changed.
  """
  start = max(file.size - _TAIL, 0)
  length = int.from_bytes(file.read(start, file.size)[:4], "little")
  return file.read(start - length, start) if length <= start else b""


def groups_of(data: bytes) -> list[Group]:
  """Returns the row groups that a footer describes.

  Raises:
    thrift.Odd: it is none, or damaged.
  """
  try:
    fields, _ = thrift.record(data, 0, _WANTED)
    return [_group(group) for group in fields.get(4) or []]
  except (IndexError, KeyError, TypeError, AttributeError) as error:
    raise thrift.Odd("footer") from error


def _group(fields) -> Group:
  return Group(fields[3], tuple(_chunk(c.get(3)) for c in fields[1]))


def _chunk(fields) -> Chunk | None:
  """Returns a chunk; None if its description is elsewhere."""
  if fields is None:
    return None
  start = fields[9]
  if 0 < fields.get(11, 0) < start:  # a dictionary comes first
    start = fields[11]
  whole = (fields[1], fields[4], fields[5], start, fields[7], fields[6])
  if any(not isinstance(value, int) or value < 0 for value in whole):
    raise thrift.Odd("chunk")
  kind, codec, count, _, packed, unpacked = whole
  nulls = (fields.get(12) or {}).get(3)
  nulls = nulls if isinstance(nulls, int) else None
  return Chunk(kind, codec, count, start, (packed, unpacked), nulls)
