"""Reads Parquet files by row groups, of each the columns that are needed.

Of PyArrow only what raises errors is used: the descriptions of columns of a
damaged file are read in `footer.py`.
"""

import functools
import logging
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from lavit_jax.core.storage import files
from lavit_jax.data.indexes.tables import arrow, arrow_rows, tables
from lavit_jax.data.indexes.tables.parquet import footer, pages, thrift
from lavit_jax.data.records import columns

_LOG = logging.getLogger(__name__)
_KIND = "a Parquet file"
_BATCH = 1024  # rows that are decoded together while a file is indexed
_BUFFER = 4 << 20  # bytes that are read together meanwhile
_SMALL = 1 << 20  # bytes of a row group's images that are read together
_LARGE = 256 << 20  # bytes of a row group's images that are worth a warning


class ParquetFile:
  """A Parquet file that is open, as a `tables.Table`.

  Attributes:
    layout: what is read of it.
    state: of the file, see `tables.version_of`.
  """

  def __init__(self, file: tables.File) -> None:
    """Reads the end of the file, where its columns are described.

    Raises:
      errors.DataError: it is none, cut off or damaged; it has no columns that
        can be read, or it is unclear which are meant.
      OSError: it cannot be read.
    """
    self._path = file.path
    self._library = arrow.parquet()
    self._bytes = tables.Bytes(file.path)
    self.state = self._bytes.state
    tables.check_start(file.path, self._bytes.read(0, 64), _KIND)
    with tables.named(file.path, _KIND):
      opened = self._library.ParquetFile(self._bytes.stream())
      self._metadata, self._schema = opened.metadata, opened.schema_arrow
      self._leaves = [
        opened.schema.column(i) for i in range(len(opened.schema))
      ]
      self._blocks = range(self._metadata.num_row_groups)
    found = arrow.columns_of(self._schema, file.features)
    self.layout = columns.layout(
      columns.listing(found) if file.listing else found,
      file.name,
      image=file.image,
      text=file.text,
    )
    # How many encoded images a list has is only seen by reading them.
    self._lists = [
      column.name
      for column in self.layout.images.values()
      if column.many and column.kind == "bytes"
    ]

  @functools.cached_property
  def _groups(self) -> list[footer.Group]:
    """The row groups, as the footer describes them; [] if that is unclear."""
    try:
      groups = footer.groups_of(footer.data_of(self._bytes))
    except thrift.Odd:
      return []
    usual = len(groups) == len(self._blocks) and all(
      len(group.chunks) == len(self._leaves) for group in groups
    )
    return groups if usual else []

  def _numbers_of(self, name) -> list[int]:
    """Returns the numbers of the leaves of a column."""
    return [
      number
      for number, leaf in enumerate(self._leaves)
      if leaf.path == name or leaf.path.startswith(f"{name}.")
    ]

  def _leaves_of(self, name) -> list[str]:
    return [self._leaves[number].path for number in self._numbers_of(name)]

  def _paths_of(self, name) -> list[str]:
    return [leaf for leaf in self._leaves_of(name) if leaf.endswith(".path")]

  def _bytes_of(self, name) -> list[int]:
    """Returns the number of the leaf with the bytes of images, in a list."""
    some = self._numbers_of(name)
    if len(some) == 1:
      return some
    return [n for n in some if self._leaves[n].path.endswith(".bytes")]

  def _light(self) -> list[str]:
    """Returns the leaves that are read of all rows: no bytes of images."""
    leaves = [
      leaf
      for name in self.layout.fields
      for leaf in self._leaves_of(name)
      if leaf == name or not leaf.endswith(".bytes")  # of images in messages
    ]
    for column in self.layout.images.values():
      leaves += self._light_of(column)
    return leaves

  def _light_of(self, column) -> list[str]:
    if column.kind == "text" or column.name in self._lists:
      return self._leaves_of(column.name)
    return self._paths_of(column.name) if column.kind == "image" else []

  def _held(self, block) -> dict[str, str]:
    """Returns whether each column of images has their bytes in a block."""
    return {
      column.name: self._held_of(column.name, block)
      for column in self.layout.images.values()
      if column.kind != "text"
    }

  def _held_of(self, name, block):
    """Goes by the number of nulls, which writers note."""
    leaves = self._bytes_of(name)
    if not leaves or arrow.has_no_bytes(self._schema.field(name).type):
      return arrow_rows.NONE
    chunk = self._groups[block].chunks[leaves[0]] if self._groups else None
    if chunk is None or chunk.nulls is None:
      return arrow_rows.SOME
    if not chunk.nulls:
      return arrow_rows.ALL
    return arrow_rows.NONE if chunk.nulls >= chunk.count else arrow_rows.SOME

  def _open(self, buffer_size: int = 0) -> Any:
    """Returns a reader for one thread."""
    return self._library.ParquetFile(
      self._bytes.stream(),
      metadata=self._metadata,
      buffer_size=buffer_size,
      pre_buffer=False,
      page_checksum_verification=True,
    )

  def scan(self) -> Iterator[tuple[int, int, arrow_rows.Rows]]:
    """Yields (row group, 0, some of its rows), without bytes of images.

    Raises:
      errors.DataError: the file is cut off or damaged.
    """
    leaves, total = self._light(), 0
    self._warn_of_large()
    for block in self._blocks:
      seen = 0
      with tables.named(self._path, _KIND):
        held, batches = self._held(block), self._batches(block, leaves)
      while True:
        with tables.named(self._path, _KIND):
          batch = next(batches, None)
          if batch is None:
            break
          rows = arrow_rows.Rows(*batch, self.layout, held)
        seen += len(rows)
        yield block, 0, rows
      said = self._groups[block].rows if self._groups else seen
      self._check_count(seen, said)
      total += seen
    self._check_count(total, self._metadata.num_rows)

  def _check_count(self, seen, said):
    """Refuses other numbers of rows than the footer says."""
    if said != seen:
      reason = f"{seen} rows in place of {said}"
      raise tables.damaged(self._path, _KIND, reason)

  def _batches(self, block, leaves) -> Iterator[tuple[Any, int]]:
    """Yields (table, number of its rows) of some rows of a row group."""
    library = arrow.library()
    if not leaves:  # images alone: there is nothing to be read of a row
      count = self._groups[block].rows
      for start in range(0, count, _BATCH):
        yield library.table({}), min(_BATCH, count - start)
      return
    opened = self._open(buffer_size=_BUFFER)
    for batch in opened.iter_batches(
      batch_size=_BATCH, row_groups=[block], columns=leaves, use_threads=False
    ):
      table = library.Table.from_batches([batch])
      yield self._without_images(table), len(batch)

  def _warn_of_large(self):
    """Warns if an image can only be read with very many others."""
    numbers = [
      number
      for column in self.layout.images.values()
      if column.kind != "text"
      for number in self._bytes_of(column.name)
    ]
    largest = max(
      (
        chunk.size[1]
        for group in (self._groups if numbers else [])
        for chunk in map(group.chunks.__getitem__, numbers)
        if chunk is not None and (chunk.codec or not self._is_paged(chunk))
      ),
      default=0,
    )
    if largest > _LARGE:
      _LOG.warning(
        "%s has row groups of up to %d MB of images that are packed, and to"
        " read one image may take all of its row group. Write the file with"
        " compression='none', which images do not need, or with"
        " row_group_size=100.",
        self._path,
        largest >> 20,
      )

  def _is_paged(self, chunk) -> bool:
    """Whether single images are read, and not all of a row group.

    In an object store the heads of pages would take a request each.
    """
    return not files.is_remote(self._path) and chunk.kind == footer.BYTES

  def rows(self, block: int) -> arrow_rows.Rows:
    """Returns the rows of a row group, without the bytes of images.

    Raises:
      errors.DataError: they cannot be read, or the file has changed.
    """
    return self._rows(block, self.layout, self._light())

  def _without_images(self, table):
    """Returns a table with marks in place of the images in lists."""
    for name in self._lists:
      if name in table.column_names:
        number = table.column_names.index(name)
        marks = arrow.marks_of(table.column(number))
        table = table.set_column(number, name, marks)
    return table

  def numbers(self, block: int) -> arrow_rows.Rows:
    """Returns the columns of numbers of a row group, read or not.

    Raises:
      errors.DataError: as `rows`.
    """
    leaves = [x for name in self.layout.numbers for x in self._leaves_of(name)]
    return self._rows(block, self.layout.of_numbers(), leaves)

  def _rows(self, block, layout, leaves) -> arrow_rows.Rows:
    with tables.named(self._path, _KIND):
      if leaves:
        table = self._without_images(self._read(block, leaves))
        count = len(table)
      else:
        table, count = arrow.library().table({}), self._groups[block].rows
      return arrow_rows.Rows(table, count, layout, self._held(block))

  def cells(self, block: int, column: str) -> "arrow_rows.Cells | _Paged":
    """Returns the images in a column of a row group.

    Raises:
      OSError: they cannot be read, or the file has changed.
    """
    leaves, paths = self._leaves_of(column), self._paths_of(column)
    found = self._pages(block, self._bytes_of(column))
    if found is None:
      return self._whole(block, leaves)
    return _Paged(
      found,
      lambda: self._whole(block, leaves),
      (lambda: self._whole(block, paths)) if paths else None,
    )

  def _whole(self, block, leaves) -> arrow_rows.Cells:
    """Returns the images in leaves of one column of a row group."""
    try:
      table = self._read(block, leaves)
      # Of a damaged column PyArrow may read nothing, and say nothing.
      if self._groups and len(table) != self._groups[block].rows:
        raise ValueError(f"{len(table)} rows are left")
    except tables.Changed:
      raise
    except Exception as error:  # PyArrow has errors of many classes
      raise OSError(
        f"the file is damaged there: {arrow.words_of(error)}"
      ) from error
    return arrow_rows.Cells(table.column(0), table.nbytes)

  def _pages(self, block, leaves) -> pages.Pages | None:
    """Returns the pages of a leaf, None if they are not read one by one."""
    if not leaves or not self._groups:
      return None
    chunk, leaf = self._groups[block].chunks[leaves[0]], self._leaves[leaves[0]]
    if chunk is None or leaf.max_repetition_level or chunk.size[1] < _SMALL:
      return None
    try:
      if self._is_paged(chunk):
        return pages.Pages(self._bytes, chunk, leaf.max_definition_level)
    except thrift.Odd:
      pass
    return None

  def _read(self, block, leaves):
    return self._open().read_row_group(block, columns=leaves, use_threads=False)

  def sample(self, count: int) -> list[dict[str, Any]]:
    """Returns columns that are not read, of the first rows."""
    names = [name for name in self.layout.unread if not self._is_bytes(name)]
    leaves = [leaf for name in names for leaf in self._leaves_of(name)]
    if not leaves or not self._blocks:
      return []
    with tables.named(self._path, _KIND):
      batches = self._open(buffer_size=_BUFFER).iter_batches(
        batch_size=count, row_groups=[0], columns=leaves, use_threads=False
      )
      batch = next(batches, None)
      try:
        return batch.to_pylist() if batch is not None else []
      except UnicodeDecodeError:
        return []

  def _is_bytes(self, name):
    """Whether a column may be large: of bytes, or of images."""
    kind, _ = arrow.kind_of(self._schema.field(name).type)
    return kind in ("bytes", "image")

  def stored(self) -> int:
    """Returns a checksum of where the images are, and of their sizes."""
    return zlib.crc32(footer.data_of(self._bytes))


class _Paged:
  """Images of a column, of which only the pages that are asked for are read.

  Attributes:
    nbytes: that it may take in memory.
  """

  def __init__(
    self,
    found: pages.Pages,
    whole: Callable[[], arrow_rows.Cells],
    paths: Callable[[], arrow_rows.Cells] | None,
  ) -> None:
    """Takes the pages; and what reads the whole column, and only paths."""
    self._pages, self._whole, self._paths = found, whole, paths
    self.nbytes = found.nbytes

  def value(self, j: int, place: int) -> bytes | str | None:
    """Returns an image of row j: its bytes, or else its path, or None.

    Raises:
      OSError: it cannot be read, or the file has changed.
    """
    try:
      value = self._pages.value(j)
    except thrift.Odd:
      return self._whole().value(j, place)
    if value is not None or self._paths is None:
      return value
    return self._paths().value(j, place)
