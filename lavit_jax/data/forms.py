"""One row of a user's file: the fields that are known, and what they mean.

The table of what a line may hold stands in `jsonl.py`.
"""

import dataclasses
import os
import re

from lavit_jax.data import examples, fields, lines

_LEARNERS = {"user": False, "system": False, "assistant": True}
_ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names
_MESSAGES = ("messages", "document", "conversations")
_HERE = "<image>"  # where a picture stands in a text, in LLaVA's form
_KNOWN = {
  "": {
    *("image", "images", "file_name", "filename", "filepath"),
    *("caption", "captions", "sentences", "text", "txt"),
    *("question", "questions", "answer", "answers", "answer_type", "type"),
    *("multiple_choice_answer", "edits", *_MESSAGES),
  },
  "questions": {
    *("question", "answer", "answers", "answer_type", "type"),
    *("multiple_choice_answer",),
  },
  "edits": {"instruction", "image"},
} | {
  field: {
    *("role", "from", "content", "value", "type", "text"),
    *("image", "image_url", "path", "url", "write"),
  }
  for field in _MESSAGES
}
_SAYING = _KNOWN[""] - {"image", "images", "file_name", "filename", "filepath"}
# Those that would change what a line is, were they misspelt.
_SPELT = (*sorted(_SAYING - {"type", "answer_type"}), "image", "file_name")
# Fields that say where a line comes from, not what it is about.
_ABOUT = re.compile(
  r"(^|_)(id|url|key|source|repo|split|license|date|time|hash|sha256|md5|lang"
  r"|language|dataset|format|shard|path)s?(_|$)",
  re.IGNORECASE,
)
_PICTURE = re.compile(r"\.(avif|bmp|gif|heic|jpe?g|png|tiff?|webp)$", re.I)


@dataclasses.dataclass
class Entry:
  """What one line holds. Pictures are paths relative to the file."""

  captions: list = dataclasses.field(default_factory=list)
  questions: list = dataclasses.field(default_factory=list)  # (type, q, a)
  edits: list = dataclasses.field(default_factory=list)  # (words, picture)
  parts: list = dataclasses.field(default_factory=list)
  image: str | None = None
  text: str | None = None

  def pictures(self):
    """The paths of all its pictures, in reading order."""
    shown = [p.image for p in self.parts if isinstance(p, examples.ImagePart)]
    first = [] if self.image is None else [self.image]
    return [*first, *(picture for _, picture in self.edits), *shown]


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
    _check_spelling(row)
    entry = Entry()
    image = _image(row)
    if image is not None:
      entry.image = self._path(image)
      entry.captions = fields.captions(row)
      entry.questions = fields.questions(row)
      for edit in fields.listed(row, "edits", dict):
        words = fields.words(edit, "instruction")
        entry.edits.append((words, self._path(edit.get("image"))))
    entry.parts = self._parts(row, image)
    text = "text" if "text" in row else "txt"
    if text in row and image is None:
      entry.text = fields.words(row, text)
    if image is None and not entry.pictures():
      _check_alone(row)
    said = row.keys() & _SAYING
    has = entry.captions, entry.questions, entry.edits, entry.parts, entry.text
    if not any(has) and (said or image is None):
      raise lines.BadLine(
        "holds no picture, caption, question, edit, messages or text; has"
        f" {sorted(row)[:8]}{_hint(row)}"
      )
    self._count_unread(number, row)
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
      f" {', '.join(sorted(_KNOWN['']))}."
    )

  def _count_unread(self, number, row):
    for field, value in dict(_unknown(row)).items():
      if field not in self._ignored:
        self.unread.setdefault(field, [0, number, value])[0] += 1

  def _parts(self, row, image):
    """Parts of an interleaved document; ImagePart.image is still a path."""
    given = [f for f in _MESSAGES if f in row]
    if len(given) > 1:
      raise lines.BadLine(f"has {' and '.join(given)}; keep one of them")
    if not given:
      if image is None and row.get("images"):
        raise lines.BadLine(
          "has images, which are read beside messages alone; call one picture"
          " image, and write a line for each"
        )
      return []
    messages = fields.listed(row, given[0], (dict, str))
    beside = _Beside(row, image, needed=given[0] == "conversations")
    parts = []
    for k, message in enumerate(messages):
      role = _role(message)
      if role is None:
        parts += self._some(message, None, beside)
        continue
      turn = []
      for part in _content(message):
        turn += self._some(part, _LEARNERS[role], beside)
      last = turn[-1] if turn else None
      again = [_role(m) for m in messages[k + 1 : k + 2]] == [role]
      if role == "assistant" and isinstance(last, examples.TextPart):
        turn[-1] = dataclasses.replace(last, end=not again)
      parts += turn
    beside.check()
    last = parts[-1] if parts else None
    if isinstance(last, examples.ImagePart) and last.weight:
      parts[-1] = dataclasses.replace(last, write=True)
    said = (isinstance(p, examples.ImagePart) or p.text.strip() for p in parts)
    return parts if any(said) else []

  def _some(self, part, learn, beside):
    """Parts of one part; learn is None where nobody speaks."""
    weight = 0.0 if learn is False else 1.0
    if isinstance(part, str):
      part = {"type": "text", "text": part}
    kind = part.get("type")
    if kind == "text":
      return self._pieces(
        fields.whole_words(part, "text"), weight, learn, beside
      )
    if kind not in ("image", "image_url"):
      raise lines.BadLine(
        f"a part of type {kind!r}; known: text, image, image_url"
      )
    write = bool(part.get("write", learn))
    named = [
      part[f] for f in ("image", "image_url", "path", "url") if f in part
    ]
    value = named[0] if named else beside.take()
    return [examples.ImagePart(self._path(value), write, weight)]

  def _pieces(self, text, weight, learn, beside):
    """A text with its <image> marks as parts; "" gives none."""
    if not beside or _HERE not in text:
      return [examples.TextPart(text, weight)] if text else []
    # White space round a mark belongs to the form, not to the text.
    first, *rest = text.split(_HERE)
    texts = [first.rstrip(), *(t.strip() for t in rest[:-1]), rest[-1].lstrip()]
    parts = []
    for k, piece in enumerate(texts):
      if k:
        path = self._path(beside.take())
        parts.append(examples.ImagePart(path, bool(learn), weight))
      if piece:
        parts.append(examples.TextPart(piece, weight))
    return parts

  def _path(self, value):
    """A picture's path, checked to lie under the file's folder."""
    if isinstance(value, dict):  # datasets' and OpenAI's forms
      value = value.get("path", value.get("url", value))
    if not isinstance(value, str) or not value or "\0" in value:
      raise lines.BadLine(f"image is {value!r:.60}, expected a path")
    fields.check_unicode("image", value)
    if "://" in value or value.startswith("data:"):
      raise lines.BadLine(
        f"image {value!r:.60} is an address or the picture itself; expected"
        " the path of a file: write the picture beside the file first"
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


class _Beside:
  """Pictures given beside messages, for the marks in them, in order."""

  def __init__(self, row, image, *, needed):
    self._given = fields.listed(row, "images", (str, dict))
    self._must = needed or bool(self._given)
    if not self._given and image is not None:
      self._given = [image]
    self._left = self._given[::-1]

  def __bool__(self):
    return bool(self._given)

  def take(self):
    """The next picture."""
    self._must = True
    if not self._left:
      raise lines.BadLine(
        f"the messages ask for more pictures than the {len(self._given)} given"
        " as image or images"
      )
    return self._left.pop()

  def check(self):
    """Refuses pictures that no message asks for."""
    if self._must and self._left:
      raise lines.BadLine(
        f"{len(self._left)} of {len(self._given)} pictures given as image or"
        f" images stand nowhere in the messages; write {_HERE} in their places"
      )


def _role(message):
  """Who speaks, None for nobody."""
  role = None
  if isinstance(message, dict):
    role = message.get("role", message.get("from"))
  if role is None:
    return None
  name = _ROLES.get(role, role) if isinstance(role, str) else role
  if name not in _LEARNERS if isinstance(name, str) else True:
    known = sorted({*_LEARNERS, *_ROLES})
    raise lines.BadLine(f"role {role!r:.40} is none of {known}")
  return name


def _content(message):
  """What is said, a list of str and dicts."""
  field = "content" if "content" in message else "value"
  if field not in message:
    raise lines.BadLine("a message has a role and no content")
  if isinstance(message[field], str):
    return [message[field]]
  return fields.listed(message, field, (dict, str))


def _check_spelling(row):
  """Refuses a field that is a known one but for its spelling."""
  plain = lambda name: re.sub(r"[^a-z]", "", name.lower())
  known = {plain(name): name for name in _SPELT}
  for field in row.keys() - _KNOWN[""]:
    meant = known.get(plain(field))
    if meant and meant not in row:
      raise lines.BadLine(f"has a field {field!r:.40}: write it {meant!r}")


def _check_alone(row):
  """Refuses words without a picture beside what looks like one."""
  for field, value in row.items():
    if field in _KNOWN[""] or not isinstance(value, str):
      continue
    if _PICTURE.search(value) and "://" not in value:
      raise lines.BadLine(
        f"has no picture, but a field {field!r:.40} that looks like one,"
        f" {value!r:.60}; call it image, or leave it out"
      )


def _hint(row):
  """What a row without anything usable may be meant as."""
  if isinstance(row.get("annotations"), list):
    return "; it looks like COCO's annotations: write a line for each picture"
  if "answer" in row.keys() - {"question"} and "question" not in row:
    return "; an answer needs its question"
  if any(isinstance(v, str) and "://" in v for v in row.values()):
    return (
      "; pictures are read from files, not from addresses: download them, and"
      " give their paths as image"
    )
  if paths := [
    k for k, v in row.items() if isinstance(v, str) and _PICTURE.search(v)
  ]:
    return f"; {paths[0]!r:.40} looks like a picture: call it image"
  return ""


def _unknown(row, within=""):
  """(field, text) of fields that carry text and are not known."""
  for field, value in row.items():
    name = f"{within}.{field}" if within else field
    if field in _KNOWN[within]:
      inner = within or field
      if inner in _KNOWN and isinstance(value, list):
        for one in value:
          if isinstance(one, dict):
            yield from _unknown(one, inner)
      continue
    text = _text_in(value)
    if text is not None and not _ABOUT.search(field):
      yield name, text


def _text_in(value):
  """The first text with a letter in a value, None if there is none."""
  if isinstance(value, str):
    wordless = "://" in value or not any(c.isalpha() for c in value)
    return None if wordless else value
  if isinstance(value, (list, dict)):
    inner = value.values() if isinstance(value, dict) else value
    return next((t for v in inner if (t := _text_in(v)) is not None), None)
  return None


def _image(row):
  """What stands for the picture of a row, None if nothing does."""
  for field in ("image", "file_name", "filename"):
    if field in row:
      folder = row.get("filepath")  # of Karpathy's splits of COCO
      if field == "filename" and isinstance(folder, str):
        return f"{folder}/{row[field]}"
      return row[field]
  return None
