"""Reads rows and images of Arrow's tables in memory."""

from collections.abc import Iterable, Mapping
from typing import Any

from lavit_jax.data.indexes.tables import arrow, tables
from lavit_jax.data.records import columns, lines

# Whether the images of a column are in the table: of all rows that have one,
# of none, or of some; the last also where it is not known.
ALL, NONE, SOME = "all", "none", "some"


class Rows:
  """Some rows of a table; the bytes of images may be missing in it.

  Attributes:
    nbytes: of the rows in memory, without bytes of images.
  """

  def __init__(
    self,
    table: Any,
    count: int,
    layout: columns.Layout,
    held: Mapping[str, str],
  ) -> None:
    """Takes rows.

    Args:
      table: pyarrow.Table with the columns that are read; of those of images
        at least the paths.
      count: number of rows; a table without columns has none.
      layout: of the table.
      held: for each column of images without its bytes, ALL, NONE or SOME.
    """
    self._count, self._layout, self._held = count, layout, held
    self._columns = {name: table.column(name) for name in table.column_names}
    of_images = {column.name for column in layout.images.values()}
    self.nbytes = sum(
      column.nbytes
      for name, column in self._columns.items()
      if name not in of_images or name in held
    )

  def __len__(self):
    return self._count

  def values(self, j: int) -> dict[str, Any]:
    """Returns row j, as `table_rows.Reader.read` takes it.

    Raises:
      lines.BadLine: a text is not UTF-8.
    """
    try:
      out = {
        name: self._columns[name][j].as_py() for name in self._layout.fields
      }
      for column in self._layout.images.values():
        out[column.name] = self._image(column, j)
    except (UnicodeDecodeError, ValueError) as error:  # also times out of range
      raise lines.BadLine(
        f"holds a value that cannot be read ({arrow.words_of(error)})"
      ) from error
    return out

  def _image(self, column, j):
    """Returns the cell of an image: path, True, None, or a list of these."""
    held = self._held.get(column.name)
    if column.name not in self._columns:  # bytes, which are not loaded
      return None if held == NONE else True
    cell = self._columns[column.name][j]
    if not column.many:
      return _found(column, cell, held)
    return [_found(column, item, held) for item in items_of(cell)]

  def name(self, j: int, column: str, place: int) -> str | None:
    """Returns the name that an image of row j has in the table, if any."""
    if column not in self._columns:
      return None
    cell = self._columns[column][j]
    cell = cell.values[place] if place >= 0 else cell
    if not hasattr(cell.type, "get_field_index"):
      return None  # bytes alone
    if cell.type.get_field_index("path") < 0:
      return None
    try:
      return _path(cell["path"].as_py())
    except UnicodeDecodeError:
      return None

  def plain(self) -> tables.Plain | None:
    """Returns the rows as texts, where they are nothing else."""
    name, image = self._layout.lone_text(), self._layout.lone_image()
    if name is None or (self._layout.images and image is None):
      return None
    if not arrow.is_text(self._columns[name].type):
      return None
    names: list[str | None] = [None] * len(self)
    try:
      if image is not None:
        if image.kind == "text" or self._held_of(image) != ALL:
          return None
        if image.kind == "image" and self._has_names(image.name):
          paths = self._inner_of(image.name, "path").to_pylist()
          names = [_path(path) for path in paths]
      texts = self._columns[name].to_pylist()
    except UnicodeDecodeError:
      return None
    return tables.Plain(texts, names, image is not None)

  def _held_of(self, column):
    """Returns ALL only if every row has the bytes of its image."""
    if column.name in self._held:
      return self._held[column.name]
    cells = self._columns[column.name]
    if column.kind == "bytes":
      return SOME if cells.null_count else ALL
    nulls = cells.null_count or self._inner_of(column.name, "bytes").null_count
    return SOME if nulls else ALL

  def _has_names(self, name):
    column = self._columns.get(name)
    return column is not None and column.type.get_field_index("path") >= 0

  def _inner_of(self, name, inner):
    """Returns the values of a record's field, for all rows."""
    import pyarrow.compute  # optional extra

    return pyarrow.compute.struct_field(self._columns[name], inner)


def items_of(cell: Any) -> Iterable[Any]:
  """Returns the items of a list's cell; none if it is null."""
  values = cell.values if cell.is_valid else None
  return () if values is None else values


def _found(column, cell, held):
  """Returns path, True or None for an image's cell."""
  if not cell.is_valid:
    return None
  if column.kind == "text":
    return cell.as_py()
  if column.kind == "bytes":
    return True
  fields = {field.name for field in cell.type}
  path = cell["path"] if "path" in fields else None
  if "bytes" in fields and held is None:
    held = ALL if cell["bytes"].is_valid else NONE
  if held != NONE:
    return True
  return _path(path.as_py()) if path is not None else None


def _path(value: Any) -> str | None:
  """Returns a path; Spark and others write texts as plain bytes.

  Raises:
    UnicodeDecodeError: it is not UTF-8.
  """
  if isinstance(value, bytes):
    value = value.decode()
  return value if value and isinstance(value, str) else None


class Cells:
  """The images in one column of some rows.

  Attributes:
    nbytes: of the column in memory; 0 if it is a file that is mapped there.
  """

  def __init__(self, column: Any, nbytes: int) -> None:
    """Takes a column: pyarrow.ChunkedArray."""
    self._column, self.nbytes = column, nbytes

  def value(self, j: int, place: int) -> bytes | str | None:
    """Returns an image of row j: its bytes, or else its path, or None.

    Raises:
      OSError: it is not there, or its path is not UTF-8.
    """
    try:
      cell = self._column[j]
      if place >= 0:
        cell = cell.values[place]
    except (IndexError, TypeError) as error:
      raise OSError("the file is damaged there: values are missing") from error
    if not cell.is_valid:
      return None
    try:
      value = cell.as_py()
      if not isinstance(value, dict):
        return value
      data = value.get("bytes")
      return data if data is not None else _path(value.get("path"))
    except UnicodeDecodeError as error:
      raise OSError("its path is not UTF-8") from error
