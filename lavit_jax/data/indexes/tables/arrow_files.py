"""Reads Arrow files as the library `datasets` saves them, mapped into memory.

Pages of the file are read when something in them is asked for. What the file
says of its own layout is checked once, while it is indexed.
"""

import os
import zlib
from collections.abc import Iterator
from typing import Any

from lavit_jax.data.indexes import stored
from lavit_jax.data.indexes.tables import arrow, arrow_rows, tables
from lavit_jax.data.records import columns

_KIND = "an Arrow file"
_END = b"\xff\xff\xff\xff\0\0\0\0"


class ArrowFile:
  """An Arrow file that is open, as a `tables.Table`; its batches are blocks.

  Attributes:
    layout: what is read of it.
    state: of the file, see `tables.version_of`.
  """

  def __init__(self, file: tables.File) -> None:
    """Maps the file, and reads the descriptions of its batches.

    Raises:
      errors.DataError: it is none, cut off or damaged; it has no columns that
        can be read, or it is unclear which are meant.
    """
    library = arrow.library()
    self._path = file.path
    tables.version_of(file.path)
    with tables.named(file.path, _KIND):
      with open(file.path, "rb") as stream:
        tables.check_start(file.path, stream.read(64), _KIND)
      self._map = library.memory_map(os.fspath(file.path))
      self.state = self._now()
      _check_end(self._map)
      reader = library.ipc.open_stream(self._map)
      self._batches = list(reader)
      found = arrow.columns_of(reader.schema, file.features)
    self.layout = columns.layout(
      found, file.name, image=file.image, text=file.text
    )
    names = [column.name for column in self.layout.images.values()]
    self._names = [*self.layout.fields, *names]

  def _now(self):
    return stored.state_of(os.fstat(self._map.fileno()))

  def _check(self):
    """Refuses a file that has changed: what was mapped may be gone."""
    if self._now() != self.state:
      raise tables.Changed(self._path)

  def scan(self) -> Iterator[tuple[int, int, arrow_rows.Rows]]:
    """Yields (batch, 0, its rows), once their layout is known to be sound.

    Raises:
      errors.DataError: the file is damaged.
    """
    library = arrow.library()
    for block, batch in enumerate(self._batches):
      with tables.named(self._path, _KIND):
        self._check()
        for name in self._names:
          column = batch.column(name)
          # Of texts that are not UTF-8 single rows are bad, not the file.
          column.view(arrow.as_bytes(column.type)).validate(full=True)
        table = library.Table.from_batches([batch])
      yield block, 0, arrow_rows.Rows(table, len(batch), self.layout, {})

  def rows(self, block: int) -> arrow_rows.Rows:
    """Returns the rows of a batch.

    Raises:
      errors.DataError: the file has changed.
    """
    return self._rows(block, self._names, self.layout)

  def numbers(self, block: int) -> arrow_rows.Rows:
    """Returns the columns of numbers of a batch, read or not.

    Raises:
      errors.DataError: the file has changed.
    """
    return self._rows(
      block, list(self.layout.numbers), self.layout.of_numbers()
    )

  def _rows(self, block, names, layout) -> arrow_rows.Rows:
    with tables.named(self._path, _KIND):
      self._check()
      batch = self._batches[block]
      table = arrow.library().Table.from_batches([batch.select(names)])
      return arrow_rows.Rows(table, len(batch), layout, {})

  def cells(self, block: int, column: str) -> arrow_rows.Cells:
    """Returns the images in a column of a batch.

    Raises:
      tables.Changed: the file has changed.
    """
    self._check()
    chunk = self._batches[block].column(column)
    return arrow_rows.Cells(arrow.library().chunked_array([chunk]), 0)

  def sample(self, count: int) -> list[dict[str, Any]]:
    """Returns columns that are not read, of the first rows."""
    library = arrow.library()
    if not self._batches:
      return []
    batch = self._batches[0]
    names = [
      name
      for name in self.layout.unread
      if arrow.kind_of(batch.column(name).type)[0] not in ("bytes", "image")
    ]
    try:
      for name in names:
        batch.column(name).validate(full=True)
      return batch.select(names).slice(0, count).to_pylist()
    except (library.ArrowException, UnicodeDecodeError):
      return []  # of columns that are not read

  def stored(self) -> int:
    """Returns a checksum of where the images are, and of their sizes."""
    digest = zlib.crc32(repr(self._map.size()).encode())
    for batch in self._batches:
      for column in self.layout.images.values():
        for part in _lengths(batch.column(column.name)):
          digest = zlib.crc32(part, digest)
    return digest


def _lengths(column) -> Iterator[bytes]:
  """Yields how long the values in a column are."""
  import pyarrow.compute  # optional extra

  if arrow.is_list(column.type):
    lengths = pyarrow.compute.list_value_length(column)
    yield from _lengths(lengths)
    yield from _lengths(column.flatten())
  elif arrow.kind_of(column.type)[0] == "image":
    for inner in column.flatten():
      yield from _lengths(inner)
  else:
    if arrow.is_bytes(column.type) or arrow.is_text(column.type):
      column = pyarrow.compute.binary_length(column)
    yield repr(column.to_pylist()).encode()


def _check_end(mapped) -> None:
  """Refuses a file that is cut off between two batches.

  Raises:
    ValueError: the mark at the end is missing.
  """
  size = mapped.size()
  mapped.seek(max(size - len(_END), 0))
  if mapped.read(len(_END)) != _END:
    raise ValueError("the mark of its end is missing")
  mapped.seek(0)
