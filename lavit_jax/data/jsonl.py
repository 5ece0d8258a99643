"""The user's own data: one JSON object a line, read as a Source.

A line may hold any of these; picture paths are relative to the file:

  {"image": "a.jpg", "caption": "a cat"}            or "captions": [...]
  {"image": "a.jpg", "questions": [{"question": "Colour?", "answer": "red"}]}
  {"image": "a.jpg", "question": "Colour?", "answers": ["red", "red", "pink"]}
  {"image": "a.jpg", "edits": [{"instruction": "…", "image": "b.jpg"}]}
  {"messages": [{"type": "text", "text": "Soup"}, {"type": "image", …}, …]}
  {"messages": [{"role": "user", "content": […]}, {"role": "assistant", …}]}
  {"text": "words without a picture"}
  {"image": "a.jpg"}                                for the tokenizer alone

In messages (or "document") a picture is read, unless it comes last, says
"write": true, or is the assistant's. Of several answers the most frequent is
learnt; what a user or the system says is read and not learnt.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os

from lavit_jax import errors, files, images
from lavit_jax.data import examples, faults

_LEARNERS = {"user": False, "system": False, "assistant": True}
_SAYING = {"caption", "captions", "question", "questions", "edits", "text"}
_KEPT_BYTES = 256 << 20  # of decoded pictures; small sets are decoded once
_PROBED = 20  # pictures looked for before a wrong folder is reported


class _BadLine(ValueError):
  """A line that cannot be used; says why."""


@dataclasses.dataclass
class _Entry:
  """What one line holds. Pictures are paths relative to the file."""

  captions: list = dataclasses.field(default_factory=list)
  questions: list = dataclasses.field(default_factory=list)  # (type, q, a)
  edits: list = dataclasses.field(default_factory=list)  # (words, picture)
  parts: list = dataclasses.field(default_factory=list)
  image: str | None = None
  text: str | None = None


class JsonlSource:
  """A Source from a JSON-lines file; pictures are decoded when asked for.

  Bad lines are skipped, counted and named in `faults`; the file is refused
  when their share passes `limit_share`.
  """

  def __init__(
    self,
    path,
    image_size,
    *,
    split="all",
    held_out_share=0.1,
    only=None,
    limit=None,
    allow_absolute=False,
    limit_share=0.05,
  ):
    """Reads the file, not the pictures.

    Args:
      path: the JSON-lines file, here or on gs://; its pictures lie there too.
      image_size: pictures are resized to this square.
      split: "all", or "train" / "held_out" by a hash of each line's first
        picture (or text), so that a picture is never in both.
      held_out_share: share of the lines that is held out.
      only: dict of fields that a line must have with these values, such as
        {"split": "train"}.
      limit: use the first so many lines that fit.
      allow_absolute: let pictures lie outside the file's folder.
      limit_share: share of bad lines that is an error.

    Raises:
      errors.DataError: no such file, nothing usable in it, too many bad lines,
        or none of the pictures there.
    """
    self.path, self.image_size = files.place(path), int(image_size)
    self.name = self.path.name
    self.faults = faults.FaultLog(f"lines of {self.name}", limit_share)
    self._allow_absolute = allow_absolute
    self._images, self._captions = {}, collections.defaultdict(list)
    self._questions = collections.defaultdict(list)
    self._examples = {task: [] for task in examples.TASKS}
    self._read(split, held_out_share, only or {}, limit)
    self.faults.check()
    self._paths = list(self._images)
    self.num_images = len(self._paths)
    self._check_found(split, only)
    kept = max(1, _KEPT_BYTES // (3 * self.image_size**2))
    self._decoded = functools.lru_cache(maxsize=kept)(self._decode)

  def _read(self, split, held_out_share, only, limit):
    """Takes in the lines that are chosen; bad ones go to `faults`."""
    chosen = 0
    for number, line in _lines(self.path):
      if limit is not None and chosen >= limit:
        break
      try:
        row = _parse(line)
        if any(row.get(k) != v for k, v in only.items()):
          continue
        entry = self._entry(row)
        if _held_out(entry, held_out_share, split):
          chosen += 1
          self._add(entry, f"{self.name}:{number}")
        self.faults.good()
      except _BadLine as error:
        self.faults.fault(f"{self.name}:{number}", error)

  def image(self, i):
    """Picture i as uint8[size, size, 3]; images.ImageError for a bad one."""
    return self._decoded(i)

  def _decode(self, i):
    loaded = images.load(self.image_path(i))
    pixels = images.to_uint8(loaded, self.image_size)
    pixels.flags.writeable = False  # it is handed out more than once
    return pixels

  def image_path(self, i):
    """Where picture i lies."""
    return self.path.parent / self._paths[i]

  def encoded(self, i):
    """Picture i at its own size, as `images.load` takes it."""
    return self.image_path(i)

  def image_key(self, i):
    """The path of picture i as the file gives it."""
    return self._paths[i]

  def captions(self, i):
    """The captions of picture i, list[str]."""
    return list(self._captions[i]) if i in self._captions else []

  def questions(self, i):
    """The questions about picture i: list of (type, question, answer)."""
    return list(self._questions[i]) if i in self._questions else []

  def tasks(self):
    """The tasks this file has examples of."""
    return tuple(t for t in examples.TASKS if self._examples[t])

  def num_examples(self, task):
    """Number of examples of a task; 0 for one the file has none of."""
    return len(self._examples.get(task, ()))

  def example(self, task, i):
    """Example i of a task."""
    return self._examples[task][i]

  def _entry(self, row):
    """Checks one row and gathers what it holds."""
    entry = _Entry()
    if "image" in row:
      entry.image = self._path(row["image"])
      entry.captions = _captions(row)
      entry.questions = _questions(row)
      for edit in _listed(row, "edits", dict):
        words = _words(edit, "instruction")
        entry.edits.append((words, self._path(edit.get("image"))))
    for field in ("messages", "document"):
      if field in row:
        entry.parts = self._messages(_listed(row, field, (dict, str)))
    if "text" in row:
      entry.text = _words(row, "text")
    said = row.keys() & _SAYING
    has = entry.captions, entry.questions, entry.edits, entry.parts, entry.text
    if not any(has) and (said or entry.image is None):
      raise _BadLine(
        "holds no picture, caption, question, edit, messages or text; has"
        f" {sorted(row)[:8]}"
      )
    return entry

  def _messages(self, messages):
    """Parts of an interleaved document; ImagePart.image is still a path."""
    parts = []
    for message in messages:
      role = message.get("role") if isinstance(message, dict) else None
      if role is None:
        parts.append(self._part(message, None))
        continue
      if role not in _LEARNERS:
        raise _BadLine(f"role {role!r} is none of {sorted(_LEARNERS)}")
      content = message.get("content")
      if isinstance(content, str):
        content = [content]
      for part in _listed({"content": content}, "content", (dict, str)):
        parts.append(self._part(part, _LEARNERS[role]))
    last = parts[-1] if parts else None
    if isinstance(last, examples.ImagePart) and last.weight:
      parts[-1] = dataclasses.replace(last, write=True)
    return parts

  def _part(self, part, learn):
    """One text or picture; learn is None where nobody speaks."""
    weight = 0.0 if learn is False else 1.0
    if isinstance(part, str):
      part = {"type": "text", "text": part}
    if part.get("type") == "text":
      return examples.TextPart(_words(part, "text"), weight)
    if part.get("type") == "image":
      write = bool(part.get("write", learn))
      return examples.ImagePart(self._path(part.get("image")), write, weight)
    raise _BadLine(f"a part of type {part.get('type')!r}; known: text, image")

  def _path(self, value):
    """A picture's path, checked to lie under the file's folder."""
    if not isinstance(value, str) or not value or "\0" in value:
      raise _BadLine(f"image is {value!r}, expected a path")
    path = os.path.normpath(value)
    outside = os.path.isabs(path) or path.split(os.sep)[0] == os.pardir
    if outside and not self._allow_absolute:
      raise _BadLine(
        f"image {value!r} lies outside the folder of {self.name}; pass"
        " allow_absolute=True if that is meant"
      )
    return path

  def _add(self, entry, key):
    """Takes a checked entry in: pictures by number, examples by task."""

    def number(path):
      return self._images.setdefault(path, len(self._images))

    def put(example):
      self._examples[example.task].append(example)

    if entry.image is not None:
      i = number(entry.image)
      self._captions[i] += entry.captions
      self._questions[i] += entry.questions
      for caption in entry.captions:
        put(examples.image_text(key, i, caption))
        put(examples.text_image(key, i, caption))
      for _, question, answer in entry.questions:
        put(examples.vqa(key, i, question, answer))
      for words, result in entry.edits:
        put(examples.edit(key, i, words, number(result)))
    if entry.parts:
      parts = [
        dataclasses.replace(p, image=number(p.image))
        if isinstance(p, examples.ImagePart)
        else p
        for p in entry.parts
      ]
      put(examples.Example(key, "document", tuple(parts)))
    if entry.text:
      put(examples.text(key, entry.text))

  def _check_found(self, split, only):
    """Refuses a file without examples, or whose pictures lie elsewhere."""
    if not self.tasks() and not self.num_images:
      raise errors.DataError(
        f"{self.path}: no usable line for split={split!r}, only={only}; it"
        f" has {self.faults.seen} lines. Choose another split, or add lines"
        ' such as {"image": "a.jpg", "caption": "a cat"}.'
      )
    first = [self.image_path(i) for i in range(min(self.num_images, _PROBED))]
    if first and not any(p.exists() for p in first):
      raise errors.DataError(
        f"{self.path}: none of its first {len(first)} pictures is there, such"
        f" as {first[0]}; paths are relative to the folder of the file."
      )


def _lines(path):
  """(number, bytes) of each line that is not blank; numbers from 1."""
  try:
    with path.open("rb") as file:
      for number, line in enumerate(file, start=1):
        if number == 1:
          line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
          yield number, line
  except OSError as error:
    raise errors.DataError(
      f"{path} cannot be read ({error.strerror}); expected a file with one"
      " JSON object a line."
    ) from error


def _parse(line):
  """One line as a dict."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise _BadLine(f"is no JSON ({error})") from error
  if not isinstance(row, dict):
    raise _BadLine(f"is a JSON {type(row).__name__}, expected an object")
  return row


def _listed(row, field, kind):
  """A list field whose items are of a kind; absent gives []."""
  value = row.get(field, [])
  if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
    raise _BadLine(f"{field} is not a list of the right kind: {value!r:.60}")
  return value


def _words(row, field):
  """A text field that is not empty."""
  value = row.get(field)
  if not isinstance(value, str) or not value.strip():
    raise _BadLine(f"{field} is {value!r:.60}, expected some text")
  return value.strip()


def _captions(row):
  """The captions of a row, one or many, without the empty ones."""
  captions = _listed(row, "captions", str)
  if "caption" in row:
    captions = [*captions, _words(row, "caption")]
  return [c.strip() for c in captions if c.strip()]


def _questions(row):
  """(type, question, answer) of a row: `questions`, or one `question`."""
  asked = _listed(row, "questions", dict)
  if "question" in row:
    asked = [*asked, row]
  out = []
  for one in asked:
    answers = [a.strip() for a in _listed(one, "answers", str) if a.strip()]
    if not answers:
      answers = [_words(one, "answer")]
    answer = collections.Counter(answers).most_common(1)[0][0]
    kind = one.get("answer_type", one.get("type", "any"))
    out.append((str(kind), _words(one, "question"), answer))
  return out


def _held_out(entry, share, split):
  """Whether an entry belongs to the split."""
  if split == "all":
    return True
  if split not in ("train", "held_out"):
    raise errors.ConfigError(
      f"split={split!r}: a JSON-lines file has all, train and held_out; use"
      " only={'split': …} to go by a field of the file."
    )
  pictures = [p.image for p in entry.parts if isinstance(p, examples.ImagePart)]
  key = entry.image or (pictures[0] if pictures else entry.text or repr(entry))
  value = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
  return (value < share * 2**32) == (split == "held_out")
