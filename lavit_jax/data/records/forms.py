"""Reads one row of a user's file: which fields it has, and what they mean.

The table of fields that a line may have is in `sources/jsonl.py`.
"""

import dataclasses
import os
from collections.abc import Collection
from typing import Any

from lavit_jax.data import examples
from lavit_jax.data.records import (
  fields,
  foreign,
  known_fields,
  lines,
  messages,
)

Question = fields.Question
_SPLIT = ", are not of 'train' and read all the same"  # of others none is said


@dataclasses.dataclass
class Entry:
  """The contents of one line; images are paths relative to the file.

  Attributes:
    captions: of the image.
    questions: about the image: (type, question, answer).
    edits: (instruction, path of the resulting image).
    parts: of a document; `ImagePart.image` is a path.
    image: the line's own image.
    text: plain text.
  """

  captions: list[str] = dataclasses.field(default_factory=list)
  questions: list[Question] = dataclasses.field(default_factory=list)
  edits: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  parts: list[Any] = dataclasses.field(default_factory=list)
  image: str | None = None
  text: str | None = None

  def images(self) -> list[str]:
    """Returns the paths of all its images, in reading order."""
    images = [] if self.image is None else [self.image]
    images += [image for _, image in self.edits]
    for part in self.parts:
      if not isinstance(part, examples.TextPart):
        images.append(part.image)
    return images

  def has_targets(self) -> bool:
    """Returns whether there is anything to learn from it."""
    return any(
      (self.captions, self.questions, self.edits, self.parts, self.text)
    )


class Reader:
  """Turns the rows of one file into entries; counts fields it does not read.

  Attributes:
    unread: unknown fields that hold text: name -> [number of lines, number of
      the first one, its value].
  """

  def __init__(
    self,
    name: str,
    allow_absolute: bool = False,
    ignored: Collection[str] = (),
  ) -> None:
    """Reads nothing yet.

    Args:
      name: of the file, for messages.
      allow_absolute: let images lie outside the file's folder.
      ignored: fields that are not counted as unread.
    """
    self.unread: dict[str, list[Any]] = {}
    self._name, self._allow_absolute = name, allow_absolute
    self._ignored = set(ignored)

  def entry(self, number: int, row: fields.Row) -> Entry:
    """Returns the Entry of a row, the line or array item `number`.

    Raises:
      lines.BadLine: the row cannot be used.
    """
    row = foreign.rewritten(row)
    known_fields.check_spelling(row)
    row = known_fields.filled(row)
    entry = Entry()
    image, used = _image(row)
    if image is not None:
      entry.image = self._path(image)
      used |= self._read_beside_image(entry, row)
    if field := messages.field_of(row, image):
      entry.parts = messages.parts_of(row, field, image, self._path)
      used |= {field, "images"}
    text = "text" if "text" in row else "txt"
    if text in row and image is None:
      entry.text = fields.text(row, text)
      used.add(text)
    if not entry.images():
      known_fields.check_alone(row)
    _check_has_targets(entry, row)
    known_fields.check_read(row, used)
    for name, value in dict(known_fields.unknown(row, used)).items():
      if name not in self._ignored:
        self.unread.setdefault(name, [0, number, value])[0] += 1
    return entry

  def report(self) -> str:
    """Returns one paragraph on unread fields, "" if there are none."""
    unread = [
      f"{count} lines have a field {field!r} (line {number}: {example!r:.60})"
      f"{_SPLIT if field == 'split' else ''}"
      for field, (count, number, example) in self.unread.items()
    ]
    if not unread:
      return ""
    more = f"; and {len(unread) - 5} more fields" if len(unread) > 5 else ""
    return (
      f"{self._name}: not read: {'; '.join(unread[:5])}{more}. Known fields are"
      f" {', '.join(sorted(known_fields.FIELDS['']))}."
    )

  def _read_beside_image(self, entry, row):
    """Adds what a row has about its image; returns the fields read."""
    entry.captions, used = fields.captions(row)
    entry.questions, used_too = fields.questions(row)
    for edit in fields.listed(row, "edits", dict):
      instruction = fields.text(edit, "instruction")
      entry.edits.append((instruction, self._path(edit.get("image"))))
    messages.check_marks(entry.captions)
    messages.check_marks(question for _, question, _ in entry.questions)
    messages.check_marks(instruction for instruction, _ in entry.edits)
    return {*used, *used_too, "edits"}

  def _path(self, value):
    """Returns an image's path, checked to lie in the file's folder."""
    if isinstance(value, dict):  # datasets' and OpenAI's forms
      value = value.get("path", value.get("url", value))
    if not isinstance(value, str) or not value or "\0" in value:
      raise lines.BadLine(f"image is {value!r:.60}, expected a path")
    fields.check_unicode("image", value)
    if "://" in value or value.startswith("data:"):
      raise lines.BadLine(
        f"image {value!r:.60} is a web address or the image itself; expected"
        " the path of a file: save the image beside this file first"
      )
    path = os.path.normpath(value)
    outside = os.path.isabs(path) or path.split(os.sep)[0] == os.pardir
    if outside and not self._allow_absolute:
      raise lines.BadLine(
        f"image {value!r} lies outside the folder of {self._name}; to allow"
        " that, set config.data.allow_absolute=True, or --allow-absolute of a"
        " command that takes --data"
      )
    return path


def _image(row):
  """Returns (value of the row's image or None, the fields it comes from)."""
  values = {f: row[f] for f in known_fields.IMAGES if f in row}
  used = set(values)
  folder = row.get("filepath")  # of Karpathy's splits of COCO
  if "filename" in values and isinstance(folder, str):
    values["filename"] = f"{folder}/{row['filename']}"
    used.add("filepath")
  if not values:
    return None, used
  image = next(iter(values.values()))
  others = {f: v for f, v in values.items() if v != image}
  several = row.get("images") or [image]
  has_messages = any(f in row for f in known_fields.MESSAGES)
  if several == [image]:
    used.add("images")
  elif not (has_messages and isinstance(several, list) and image in several):
    others["images"] = several
  if others:
    raise lines.BadLine(
      f"has two images, {next(iter(values))} {image!r:.60} and"
      f" {', '.join(f'{f} {v!r:.60}' for f, v in others.items())}; keep one,"
      " and write a line for each"
    )
  return image, used


def _check_has_targets(entry, row):
  """Refuses a row with nothing to learn, unless it is an image alone."""
  if entry.parts and not any(part.weight for part in entry.parts):
    field = next(f for f in known_fields.MESSAGES if f in row)
    raise lines.BadLine(
      f"holds nothing to learn: {field} has no words or images of the assistant"
    )
  named = sorted(row.keys() & known_fields.LEARNABLE)
  if entry.has_targets() or (entry.image is not None and not named):
    return
  if entry.image is not None or "messages" in named:
    raise lines.BadLine(
      f"holds no text in {' and '.join(named)}, {row[named[0]]!r:.60}; fill it"
      " in, or leave it out"
    )
  raise lines.BadLine(
    "holds no image, caption, question, edit, messages or text; has"
    f" {sorted(row)[:8]}{known_fields.hint(row)}"
  )
