"""Reads lists of images, metadata.csv or .jsonl, by blocks of their lines.

Where each block begins is found while the file is indexed. A cell of a CSV is
a text, also where it looks like a number; an empty one holds nothing.
"""

import codecs
import csv
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lavit_jax.core import errors
from lavit_jax.data.indexes import unpacked
from lavit_jax.data.indexes.tables import tables
from lavit_jax.data.records import columns, lines, table_rows

_BLOCK = 256  # rows
_CHUNK = 1 << 20  # bytes read at once
_MOST_LINE = 16 << 20  # bytes


class Rows:
  """Some rows of a text.

  Attributes:
    nbytes: about as many as they take in memory.
  """

  def __init__(self, rows: Sequence[Any], nbytes: int) -> None:
    """Takes rows, dicts; or lines.BadLine in place of bad ones."""
    self._rows, self.nbytes = rows, nbytes

  def __len__(self):
    return len(self._rows)

  def values(self, j: int) -> dict[str, Any]:
    """Returns row j; see `tables.Rows`."""
    row = self._rows[j]
    if isinstance(row, lines.BadLine):
      raise row
    return row

  def is_bad(self, j: int) -> bool:
    """Returns whether row j cannot be read."""
    return isinstance(self._rows[j], lines.BadLine)

  def name(self, j: int, column: str, place: int) -> None:
    """Returns None: a text holds no images."""
    del j, column, place

  def plain(self) -> None:
    """Returns None: there are no columns."""


class TextFile:
  """A CSV, or a file of JSON lines, that is open, as a `tables.Table`.

  Attributes:
    layout: None: rows are JSON lines.
    state: of the file, see `tables.version_of`.
  """

  layout = None

  def __init__(self, file: tables.File, blocks: np.ndarray) -> None:
    """Opens the file.

    Args:
      file: a CSV if its name says so, else JSON lines.
      blocks: tables.BLOCKS[n], where `rows` finds the blocks.

    Raises:
      errors.DataError: it has no usable head.
      OSError: it cannot be read.
    """
    self._file, self._blocks = file, blocks
    version, self.state = tables.version_of(file.path)
    self._bytes = tables.Bytes(unpacked.of(file.path, version))
    start = self._bytes.read(0, 64)
    tables.check_start(file.path, start, "a list of images")
    self._first = 3 if start.startswith(codecs.BOM_UTF8) else 0
    self._names: list[str] = []
    if os.fspath(file.path).lower().endswith(".csv"):
      self._read_head()

  def _read_head(self):
    """Reads the names of a CSV's columns; the first row follows them."""
    stream = self._stream(self._first)
    self._names, self._first = next(_cells(stream), ([], 0))
    names = self._names
    if not isinstance(names, list) or not names or len(set(names)) < len(names):
      raise errors.DataError(
        f"{self._file.path}: the first line of a CSV names its columns, each"
        f" once, such as file_name,text; got {self._names!r:.80}."
      )

  def _stream(self, start) -> io.BufferedReader:
    stream = self._bytes.stream()
    stream.seek(start)
    return io.BufferedReader(stream, _CHUNK)

  def _rows(self, stream) -> Iterator[tuple[Any, int]]:
    """Yields (a row or a lines.BadLine, where it ends)."""
    found = _cells(stream) if self._names else _objects(stream)
    for value, end in found:
      row = value
      if self._names and isinstance(value, list):
        row = self._of_cells(value)
      if isinstance(row, dict):
        try:
          row = _renamed(table_rows.plain_row(row), self._file)
        except lines.BadLine as error:
          row = error
      yield row, end

  def _of_cells(self, cells):
    if len(cells) != len(self._names):
      return lines.BadLine(
        f"has {len(cells)} cells, but the head names {len(self._names)}"
      )
    pairs = zip(self._names, cells, strict=True)
    return {name: cell for name, cell in pairs if cell}

  def scan(self) -> Iterator[tuple[int, int, Rows]]:
    """Yields (block, where it begins, its rows)."""
    block, start, some = 0, self._first, []
    end = start
    try:
      for row, end in self._rows(self._stream(start)):
        some.append(row)
        if len(some) == _BLOCK:
          yield block, start, Rows(some, end - start)
          block, start, some = block + 1, end, []
    except OSError as error:
      raise errors.DataError(
        f"{self._file.path} cannot be read ({error})."
      ) from error
    if some:
      yield block, start, Rows(some, end - start)

  def rows(self, block: int) -> Rows:
    """Returns the rows of a block.

    Raises:
      errors.DataError: they cannot be read, or the file has changed.
    """
    start = int(self._blocks["start"][block])
    count = int(self._blocks["rows"][block])
    more = self._blocks["start"][block + 1 : block + 2].tolist()
    stop = more[0] if more else self._bytes.size
    try:
      piece = self._bytes.read(start, stop)
    except OSError as error:
      raise errors.DataError(
        f"{self._file.path} cannot be read ({error})."
      ) from error
    found = [row for row, _ in self._rows(io.BytesIO(piece))]
    if len(found) != count:
      raise errors.DataError(f"{tables.Changed(self._file.path)}.")
    return Rows(found, len(piece))

  def numbers(self, block: int) -> Rows:
    """Returns the numbers of a block, and what looks like one in a CSV.

    Raises:
      errors.DataError: as `rows`.
    """
    rows = self.rows(block)
    found = [
      {}
      if rows.is_bad(j)
      else {name: _number(value) for name, value in rows.values(j).items()}
      for j in range(len(rows))
    ]
    return Rows(found, rows.nbytes)

  def cells(self, block: int, column: str) -> Any:
    """Raises OSError: a text holds no images."""
    raise OSError(f"{self._file.path} holds no images, block {block}, {column}")

  def sample(self, count: int) -> list[dict[str, Any]]:
    """Returns nothing: what is not read is found row by row."""
    del count
    return []

  def stored(self) -> int:
    """Returns a checksum of the file, which names the images."""
    digest = 0
    for start in range(0, self._bytes.size, _CHUNK):
      digest = zlib.crc32(self._bytes.read(start, start + _CHUNK), digest)
    return digest


def _objects(stream) -> Iterator[tuple[Any, int]]:
  """Yields (object or lines.BadLine, where it ends) of each JSON line."""
  for line in _lines(stream):
    if not line.strip():
      continue
    try:
      value = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
      value = lines.BadLine(f"is not JSON ({error})")
    if not isinstance(value, dict | lines.BadLine):
      kind = type(value).__name__
      value = lines.BadLine(f"is a JSON {kind}, expected an object")
    yield value, stream.tell()


def _once(pairs):
  """Returns a JSON object; ValueError if it has a field twice."""
  value = dict(pairs)
  if len(value) < len(pairs):
    raise ValueError("it has a field twice")
  return value


def _cells(stream) -> Iterator[tuple[Any, int]]:
  """Yields (cells of a row or lines.BadLine, where it ends) of a CSV.

  What is not UTF-8 becomes half characters, which a row is refused for.
  """
  text = (line.decode(errors="surrogateescape") for line in _lines(stream))
  reader = csv.reader(text)
  while True:
    try:
      cells: Any = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      cells = lines.BadLine(f"is no row of a CSV ({error})")
    if cells:
      yield cells, stream.tell()


def _number(value):
  """Returns a number, None for what is none."""
  if isinstance(value, str):
    try:
      return float(value)
    except ValueError:
      return None
  return value if isinstance(value, int | float) else None


def _lines(stream) -> Iterator[bytes]:
  while line := stream.readline(_MOST_LINE):
    yield line


def _renamed(row: dict[str, Any], file: tables.File) -> dict[str, Any]:
  """Returns a row with image, images and words under the names of our fields.

  Raises:
    lines.BadLine: it is unclear which images are meant.
  """
  named = [name for name in row if columns.is_listing(name)]
  chosen = next(
    (n for n in (file.image, f"{file.image}_file_name") if n in row), None
  )
  if chosen is None and "images" not in row:
    chosen = "file_name" if "file_name" in row else None
    if chosen is None and len(named) > 1:
      raise lines.BadLine(
        f"has images as {', '.join(sorted(named))}; say which are meant:"
        " config.data.image_feature"
      )
    chosen = chosen or next(iter(named), None)
  if chosen is not None:
    value = row.pop(chosen)
    row["images" if isinstance(value, list) else "image"] = value
  if file.text != columns.TEXT and file.text in row:
    row["caption" if {"image", "images"} & row.keys() else "text"] = row.pop(
      file.text
    )
  return row
