"""Chooses which columns of a table are read, and as which fields of a row.

A table has the fields of a JSON line (`sources/jsonl.py`) as columns. Its
images may be columns of any name: their type tells them. Columns that are not
read are never loaded.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lavit_jax.core import errors
from lavit_jax.data.records import foreign, known_fields, lines

# Defaults of config.data.image_feature and text_feature: the columns are found
# by their names and types.
IMAGE, TEXT = "image", "caption"
_OF_IMAGES = {"images", "filepath", *known_fields.IMAGES}
_ABLE = ("image", "bytes", "text")  # kinds of columns that can hold images
_LISTING = ("file_name", "file_names")
_WORDS = {"caption", "captions", "sentences", "text", "txt"}


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of a table.

  Attributes:
    name: of the column.
    kind: "text", "bytes", "image" (bytes and path of one), "record" (named
      values), "class" (a number that stands for a name), "number", "other".
    many: whether it holds a list of these.
    classes: names that the numbers of a "class" stand for.
    marked: whether the table says that it holds images.
  """

  name: str
  kind: str
  many: bool = False
  classes: tuple[str, ...] = ()
  marked: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
  """What is read of a table.

  Attributes:
    images: columns that hold images, by field of a row: image, images.
    fields: field of a row that each other column is read as.
    classes: names of the classes of columns that have some.
    unread: columns that are not read and may hold words or images.
    numbers: columns of numbers, by which rows may be filtered.
  """

  images: Mapping[str, Column]
  fields: Mapping[str, str]
  classes: Mapping[str, tuple[str, ...]]
  unread: tuple[str, ...]
  numbers: tuple[str, ...] = ()

  def of_numbers(self) -> "Layout":
    """Returns the layout by which only numbers are read."""
    return Layout({}, {name: name for name in self.numbers}, {}, ())

  def lone_image(self) -> Column | None:
    """Returns the column of the only image that a row can have, or None."""
    alone = self.images.get("image")
    named = {"edits", *known_fields.MESSAGES}.intersection(self.fields.values())
    if alone is None or len(self.images) > 1 or alone.many or named:
      return None
    return alone

  def lone_text(self) -> str | None:
    """Returns the column of the only text that a row can have, or None."""
    if len(self.fields) != 1 or self.classes:
      return None
    ((column, field),) = self.fields.items()
    usual = ("caption", "text", "txt") if self.images else ("text", "txt")
    return column if field in usual else None


def layout(
  columns: Sequence[Column],
  name: str,
  *,
  image: str = IMAGE,
  text: str = TEXT,
) -> Layout:
  """Returns what is read of a table with these columns.

  Args:
    columns: of the table.
    name: of the table, for messages.
    image: column of the images; "image" also finds one of another name.
    text: column of the words; "caption" also finds those of another name.

  Raises:
    errors.DataError: there is no such column, it is unclear which ones are
      meant, or none can be read.
  """
  by_name = {column.name: column for column in columns}
  form = _form(by_name) if (image, text) == (IMAGE, TEXT) else ()
  for given, default, field in (
    (image, IMAGE, "image_feature"),
    (text, TEXT, "text_feature"),
  ):
    if given not in by_name and given != default:
      raise errors.DataError(
        f"{name} has no column {given!r}, which config.data.{field} names. It"
        f" has {_listed(by_name)}."
      )
  if form:
    images = {n: by_name[n] for n in foreign.images_in(by_name)}
  else:
    images = _images(by_name, name, image)
  taken = {column.name for column in images.values()}
  rest = [column for column in columns if column.name not in taken]
  if form:
    rename = {"raw_content": "text"}  # as which `table_rows` reads it quickly
    fields = {n: rename.get(n, n) for n in form if n not in images}
  else:
    fields = _fields(rest, text, images)
  _check_spelling(name, rest, fields, images)
  if not fields and not images:
    raise errors.DataError(
      f"{name} has no column that is read; it has {_listed(by_name)}. Name the"
      " columns as the fields of a JSON line (image, caption, text, question,"
      " answer, messages), or say which they are: config.data.image_feature"
      " and config.data.text_feature."
    )
  chosen = [column for column in rest if column.name in fields]
  return Layout(
    images,
    fields,
    {c.name: c.classes for c in chosen if c.kind == "class"},
    tuple(c.name for c in rest if c.name not in fields and _has_words(c)),
    tuple(c.name for c in rest if c.kind == "number" and not c.many),
  )


def _form(by_name) -> tuple[str, ...]:
  """Returns the fields of another project's form that the columns are of."""
  holding = [by_name[name] for name in foreign.images_in(by_name)]
  able = all(column.kind in _ABLE for column in holding)
  return foreign.fields_of(by_name) if able else ()


def _has_words(column) -> bool:
  """Whether a column may hold words, or images."""
  return column.kind not in ("class", "number", "other")


def listing(found: Iterable[Column]) -> list[Column]:
  """Marks the columns of a table beside images that name these.

  As `datasets` knows them: file_name, file_names, mask_file_name and so on.
  """
  return [
    dataclasses.replace(column, marked=True)
    if column.kind == "text" and is_listing(column.name)
    else column
    for column in found
  ]


def is_listing(name: str) -> bool:
  """Returns whether a column of a table beside images names these."""
  return name in _LISTING or name.endswith(tuple(f"_{n}" for n in _LISTING))


def _listed(names: Iterable[str]) -> str:
  names = list(names)
  more = f" and {len(names) - 12} more" if len(names) > 12 else ""
  return f"{', '.join(map(repr, names[:12])) or 'no columns'}{more}"


def _images(by_name, name, image) -> dict[str, Column]:
  """Returns the columns of images, by field of a row."""
  found = [column for column in by_name.values() if _holds_images(column)]
  given = by_name.get(image)
  if image != IMAGE:
    if given.kind not in _ABLE:
      raise errors.DataError(
        f"{name}: column {image!r}, which config.data.image_feature names,"
        " holds no images: expected paths, encoded images, or lists of these."
      )
    found = [given]
  elif given is not None and given.kind in _ABLE:
    found = [given]
  elif not found:
    paths = [by_name.get(field) for field in known_fields.IMAGES]
    found = [c for c in paths if c is not None and c.kind == "text"][:1]
  elif len(found) > 1:
    found = [c for c in found if c.name in ("images", "file_name")][:1]
  if not found and (several := _several(by_name)):
    raise errors.DataError(
      f"{name} has the columns {_listed(several)} of images, and none of the"
      " name 'image'. Say which is meant: config.data.image_feature."
    )
  out = {"images" if column.many else "image": column for column in found}
  beside = by_name.get("images")
  has_messages = any(field in by_name for field in known_fields.MESSAGES)
  if beside and beside.many and out and "images" not in out and has_messages:
    out["images"] = beside
  return out


def _several(by_name) -> list[str]:
  names = [c.name for c in by_name.values() if _holds_images(c)]
  return names if len(names) > 1 else []


def _holds_images(column) -> bool:
  """Whether a column holds images by its type, not only by its name."""
  if column.kind == "image":
    return True
  if column.marked:
    return column.kind in _ABLE
  if column.name == "images":
    return column.many and column.kind in ("bytes", "text")
  return column.kind == "bytes" and _looks_like_images(column.name)


def _looks_like_images(name: str) -> bool:
  try:
    known_fields.check_alone({name: "x"})
  except lines.BadLine:
    return True
  return name in known_fields.IMAGES


def _fields(rest, text, images) -> dict[str, str]:
  """Returns the field of a row that each column is read as."""
  known = known_fields.FIELDS[""] - _OF_IMAGES
  out = {c.name: c.name for c in rest if c.name in known and _can_be_read(c)}
  out |= {c.name: c.name for c in rest if c.name in _WORDS}
  if "question" not in out:
    out = {c: f for c, f in out.items() if f not in known_fields.KINDS}
  if any(column.name == "filename" for column in images.values()):
    out |= {c.name: c.name for c in rest if c.name == "filepath"}
  given = next((c for c in rest if c.name == text), None)
  if given is not None and text != TEXT:
    others = _WORDS | set(known_fields.MESSAGES)
    out = {c: f for c, f in out.items() if f not in others}
    plain = "messages" if given.kind == "record" and given.many else None
    plain = plain or ("caption" if images else "text")
    out[text] = text if text in known and _can_be_read(given) else plain
  elif given is not None and images:
    # Beside an image these would be captions too, and one of them is meant.
    out = {c: f for c, f in out.items() if f not in ("text", "txt")}
  if images and not out:
    classes = [c for c in rest if c.kind == "class"]
    out = {c.name: "caption" for c in classes} if len(classes) == 1 else {}
  return out


def _can_be_read(column) -> bool:
  """Whether a column can be the field of its name."""
  if column.name in known_fields.MESSAGES:
    return column.many or column.kind not in ("text", "bytes")
  return column.kind != "bytes"


def _check_spelling(name, rest, fields, images) -> None:
  """Refuses columns that differ from a field that is read only in spelling."""
  row: dict[str, Any] = dict.fromkeys([*fields.values(), *images, "file_name"])
  others = [c for c in rest if c.name not in fields and _has_words(c)]
  row |= {column.name: None for column in others}
  try:
    known_fields.check_spelling(row)
  except lines.BadLine as error:
    raise errors.DataError(
      f"{name} {error}. Or say which column is meant:"
      " config.data.image_feature, config.data.text_feature."
    ) from error
