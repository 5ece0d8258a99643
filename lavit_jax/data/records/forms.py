"""One row of a user's file: the fields that are known, and what they mean.

The table of what a line may hold stands in `jsonl.py`.
"""

import dataclasses
import os

from lavit_jax.data import examples
from lavit_jax.data.records import fields, known_fields, lines, messages


@dataclasses.dataclass
class Entry:
  """What one line holds. Images are paths relative to the file."""

  captions: list = dataclasses.field(default_factory=list)
  questions: list = dataclasses.field(default_factory=list)  # (type, q, a)
  edits: list = dataclasses.field(default_factory=list)  # (words, image)
  parts: list = dataclasses.field(default_factory=list)
  image: str | None = None
  text: str | None = None

  def images(self):
    """The paths of all its images, in reading order."""
    shown = [p.image for p in self.parts if isinstance(p, examples.ImagePart)]
    first = [] if self.image is None else [self.image]
    return [*first, *(image for _, image in self.edits), *shown]

  def holds(self):
    """Whether there is anything to learn in it."""
    has = self.captions, self.questions, self.edits, self.parts, self.text
    return any(has)


class Reader:
  """Rows of one file to entries; counts fields that are not read.

  `unread` is {field: [lines, number of the first, what stands there]}.
  """

  def __init__(self, name, allow_absolute=False, ignored=()):
    """`name` of the file, for errors; fields `ignored` are not counted."""
    self.unread = {}
    self._name, self._allow_absolute = name, allow_absolute
    self._ignored = set(ignored)

  def entry(self, number, row):
    """The Entry of a row; lines.BadLine says why it cannot be used."""
    known_fields.check_spelling(row)
    row = known_fields.filled(row)
    entry = Entry()
    image, used = _image(row)
    if image is not None:
      entry.image = self._path(image)
      used |= self._beside_image(entry, row)
    if field := messages.field_of(row, image):
      entry.parts = messages.parts_of(row, field, image, self._path)
      used |= {field, "images"}
    text = "text" if "text" in row else "txt"
    if text in row and image is None:
      entry.text = fields.words(row, text)
      used.add(text)
    if not entry.images():
      known_fields.check_alone(row)
    _check_holds(entry, row)
    known_fields.check_read(row, used)
    for name, value in dict(known_fields.unknown(row, used)).items():
      if name not in self._ignored:
        self.unread.setdefault(name, [0, number, value])[0] += 1
    return entry

  def report(self):
    """One paragraph on the fields that are not read, "" if there are none."""
    found = [
      f"{count} lines have a field {field!r} (line {number}: {example!r:.60})"
      for field, (count, number, example) in self.unread.items()
    ]
    if not found:
      return ""
    more = f"; and {len(found) - 5} more fields" if len(found) > 5 else ""
    return (
      f"{self._name}: not read: {'; '.join(found[:5])}{more}. Known are"
      f" {', '.join(sorted(known_fields.FIELDS['']))}."
    )

  def _beside_image(self, entry, row):
    """Takes in what is said of the row's image; returns the fields read."""
    entry.captions, used = fields.captions(row)
    entry.questions, asked = fields.questions(row)
    for edit in fields.listed(row, "edits", dict):
      words = fields.words(edit, "instruction")
      entry.edits.append((words, self._path(edit.get("image"))))
    messages.check_marks(entry.captions)
    messages.check_marks(question for _, question, _ in entry.questions)
    messages.check_marks(words for words, _ in entry.edits)
    return {*used, *asked, "edits"}

  def _path(self, value):
    """An image's path, checked to lie under the file's folder."""
    if isinstance(value, dict):  # datasets' and OpenAI's forms
      value = value.get("path", value.get("url", value))
    if not isinstance(value, str) or not value or "\0" in value:
      raise lines.BadLine(f"image is {value!r:.60}, expected a path")
    fields.check_unicode("image", value)
    if "://" in value or value.startswith("data:"):
      raise lines.BadLine(
        f"image {value!r:.60} is an address or the image itself; expected"
        " the path of a file: write the image beside the file first"
      )
    path = os.path.normpath(value)
    outside = os.path.isabs(path) or path.split(os.sep)[0] == os.pardir
    if outside and not self._allow_absolute:
      raise lines.BadLine(
        f"image {value!r} lies outside the folder of {self._name}; if that is"
        " meant, set config.data.allow_absolute=True, or --allow-absolute of a"
        " command that takes --data"
      )
    return path


def _image(row):
  """(what stands for the image of a row or None, the fields of it)."""
  found = {f: row[f] for f in known_fields.IMAGES if f in row}
  used = set(found)
  folder = row.get("filepath")  # of Karpathy's splits of COCO
  if "filename" in found and isinstance(folder, str):
    found["filename"] = f"{folder}/{row['filename']}"
    used.add("filepath")
  if not found:
    return None, used
  image = next(iter(found.values()))
  others = {f: v for f, v in found.items() if v != image}
  several = row.get("images") or [image]
  talks = any(f in row for f in known_fields.MESSAGES)
  if several == [image]:
    used.add("images")
  elif not (talks and isinstance(several, list) and image in several):
    others["images"] = several
  if others:
    raise lines.BadLine(
      f"has two images, {next(iter(found))} {image!r:.60} and"
      f" {', '.join(f'{f} {v!r:.60}' for f, v in others.items())}; keep one,"
      " and write a line for each"
    )
  return image, used


def _check_holds(entry, row):
  """Refuses a row that says nothing; an image alone may be all there is."""
  said = sorted(row.keys() & known_fields.SAYING)
  if entry.holds() or (entry.image is not None and not said):
    return
  if entry.image is not None or "messages" in said:
    raise lines.BadLine(
      f"holds no text in {' and '.join(said)}, {row[said[0]]!r:.60}; fill it"
      " in, or leave it out"
    )
  raise lines.BadLine(
    "holds no image, caption, question, edit, messages or text; has"
    f" {sorted(row)[:8]}{known_fields.hint(row)}"
  )
