"""Reads a row of a table as a JSON line, of which images may be cells.

A row is what is left of it as a JSON line (`forms.py`), without what is null.
Of several images beside words that are no messages, the words belong to the
first; the others are images alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lavit_jax.data.records import columns, foreign, forms, known_fields, lines

_MAX_DEPTH = 64  # nested values of a row
_CELL = "<image {} of the row>"  # stands for a path in a line
MARK = "<image>"  # of messages, which words about one image may not have
_ABOUT_ONE = ("question", "questions", "edits")
# Fields that hold a list of records; a table may hold a record of lists.
_RECORDS = (
  *("questions", "edits", *known_fields.MESSAGES),
  *("prompt", "chosen", "completion", "texts", "image_info"),
)


@dataclasses.dataclass(frozen=True)
class Cell:
  """An image that a row holds itself.

  Attributes:
    column: that it is in.
    place: its place in the list there; -1 where the column has no lists.
  """

  column: str
  place: int = -1


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table.

  Attributes:
    entry: what it says; its images are named as in `names`.
    names: of all its images, in order; the words about one image are about
      the first.
    cells: those images that are no files, by name.
  """

  entry: forms.Entry
  names: tuple[str, ...]
  cells: Mapping[str, Cell]


class Reader:
  """Turns the rows of one table into entries and images."""

  def __init__(
    self, layout: columns.Layout | None, name: str, allow_absolute: bool
  ) -> None:
    """Reads nothing yet.

    Args:
      layout: of the table; None for one whose rows are JSON lines as they are.
      name: of the table, for messages.
      allow_absolute: let images lie outside the table's folder.
    """
    self._layout = layout
    self._reader = forms.Reader(name, allow_absolute)
    self._text = layout.lone_text() if layout else None
    self._image = layout.lone_image() if layout else None
    if layout and layout.images and self._image is None:
      self._text = None

  @property
  def unread(self) -> Mapping[str, list]:
    """Fields that hold text and were not read, as `forms.Reader` has them."""
    return self._reader.unread

  def read(self, number: int, values: Mapping[str, Any]) -> Row:
    """Returns a row.

    Args:
      number: of the row in its table.
      values: what the columns hold. Of a column of images it is a path, True
        for an image that is in the table, None for none, or a list of these.

    Raises:
      lines.BadLine: the row cannot be used.
    """
    if (quick := self._quick(values)) is not None:
      return quick
    raw, cells = self._row(values)
    row = dict(foreign.rewritten(raw))
    several = _several(row)
    entry = self._reader.entry(number, row)
    names = dict.fromkeys(entry.images())
    names |= dict.fromkeys(self.path(name) for name in several[1:])
    return Row(entry, tuple(names), cells)

  def _quick(self, values) -> Row | None:
    """Returns a row of an image in the table and a caption, or of a text.

    Like `read`, in a tenth of the time; None for any other row.
    """
    text = values.get(self._text)
    text = text.strip() if isinstance(text, str) else ""
    if not text or MARK in text:
      return None
    if self._image is None:
      return Row(forms.Entry(text=text), (), {})
    if values[self._image.name] is not True:
      return None
    name = _CELL.format(0)
    entry = forms.Entry(captions=[text], image=name)
    return Row(entry, (name,), {name: Cell(self._image.name)})

  def path(self, value: str) -> str:
    """Returns the path of an image, checked to lie in the table's folder.

    Raises:
      lines.BadLine: it does not, or is none.
    """
    path = self._reader.entry(0, {"image": value}).image
    assert path is not None
    return path

  def _row(self, values) -> tuple[dict[str, Any], dict[str, Cell]]:
    """Returns (the row as a JSON line, its cells by their names in it)."""
    if self._layout is None:
      return dict(values), {}
    row: dict[str, Any] = {}
    cells: dict[str, Cell] = {}

    def named(value, column, place=-1):
      if value is not True:
        return value
      name = _CELL.format(len(cells))
      cells[name] = Cell(column.name, place)
      return name

    for field, column in self._layout.images.items():
      value = values.get(column.name)
      if column.many:
        value = [named(v, column, place) for place, v in enumerate(value or ())]
      if value is not None and value != []:
        row[field] = named(value, column)
    for name, field in self._layout.fields.items():
      value = values.get(name)
      if names := self._layout.classes.get(name):
        value = _class_of(value, names, name)
      if field in _RECORDS:
        value = _records(value)
      if not _missing(value):
        row[field] = value
    return plain_row(row), cells


def _several(row) -> list[str]:
  """Makes the first of several images the row's own; returns all of them."""
  several = row.get("images")
  if not isinstance(several, list) or any(
    field in row for field in known_fields.MESSAGES
  ):
    return []
  if not several or "image" in row:
    return []  # the second is refused unless both are the same
  about = [field for field in _ABOUT_ONE if row.get(field)]
  if len(several) > 1 and about:
    raise lines.BadLine(
      f"has {' and '.join(about)} about {len(several)} images; write messages,"
      " with an <image> for each"
    )
  row["image"] = several[0]
  del row["images"]
  return several


def _class_of(value, names, column):
  """Returns the names that numbers of classes stand for; None for -1."""
  if isinstance(value, list):
    found = [_class_of(item, names, column) for item in value]
    return [name for name in found if name is not None]
  if value is None or value == -1:  # as `datasets` marks what is not known
    return None
  if not isinstance(value, int) or not 0 <= value < len(names):
    raise lines.BadLine(
      f"{column} is {value!r:.40}, expected one of {len(names)} classes"
    )
  return names[value]


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a row as a JSON line would hold it: see `plain`.

  Raises:
    lines.BadLine: as of `plain`.
  """
  return plain(row) | lines.paired(row, lambda item: plain(item, 2))


def plain(value: Any, depth: int = 0) -> Any:
  """Returns a value as JSON would hold it, without what is null or NaN.

  Raises:
    lines.BadLine: it is nested too deeply, or has bytes that are not UTF-8.
  """
  if depth > _MAX_DEPTH:
    raise lines.BadLine(f"is nested more than {_MAX_DEPTH} deep")
  if isinstance(value, dict):
    kept = {k: v for k, v in value.items() if not _missing(v)}
    return {k: plain(v, depth + 1) for k, v in kept.items()}
  if isinstance(value, list):
    return [plain(v, depth + 1) for v in value if not _missing(v)]
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError as error:
      raise lines.BadLine(f"holds a text that is not UTF-8 ({error})") from None
  return value


def _missing(value):
  return value is None or (isinstance(value, float) and math.isnan(value))


def _records(value):
  """Returns a record of lists as a list of records, others as they are.

  {"question": ["a?", "b?"], "answer": ["x", "y"]} is how `datasets` writes a
  sequence of questions.
  """
  if not isinstance(value, dict) or not value:
    return value
  if not all(isinstance(items, list) for items in value.values()):
    return value
  if len({len(items) for items in value.values()}) > 1:
    raise lines.BadLine(
      f"has lists of different lengths: {sorted(value)!r:.60}"
    )
  return [
    dict(zip(value, items, strict=True))
    for items in zip(*value.values(), strict=True)
  ]
