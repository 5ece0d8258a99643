"""The user's own data: one JSON object a line, read as a Source.

A line may hold any of these; image paths are relative to the file:

  {"image": "a.jpg", "caption": "a cat"}            or "captions": [...]
  {"image": "a.jpg", "text": "a cat"}               the same
  {"image": "a.jpg", "questions": [{"question": "Colour?", "answer": "red"}]}
  {"image": "a.jpg", "question": "Colour?", "answers": ["red", "red", "pink"]}
  {"image": "a.jpg", "edits": [{"instruction": "…", "image": "b.jpg"}]}
  {"messages": [{"type": "text", "text": "Soup"}, {"type": "image", …}, …]}
  {"messages": [{"role": "user", "content": […]}, {"role": "assistant", …}]}
  {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>…"}]}
  {"text": "words without an image"}
  {"image": "a.jpg"}                                for the tokenizer alone

Other names: "file_name" (Hugging Face's imagefolder), "filename" below a
"filepath" and "sentences" (Karpathy's splits) for image and captions; "txt"
for text; "document" for messages. A field that is null or NaN is not there,
nor is a text that is empty.

In messages an image is read, unless it comes last, says "write": true, or is
the assistant's. An <image> in their texts (or a part {"type": "image"} without
a path) stands for the next of the line's "images", or for its "image"; there
must be as many. Texts keep their white space, but round <image>; empty ones
are passed over. What a user ("human") or the system says is read and not
learnt; after each answer of the assistant ("gpt") its end is learnt.

Of several answers the most frequent is learnt; they may be VQA's, {"answer":
"red"}; numbers are texts, true and false are yes and no.

A line that is not understood is named with its place: as bad, where it would
be taken for something else (half a character of an emoji in a text too; words
beside what looks like an image under another name) or where a field above
would be lost; or in one warning, where it is read but for another field with
text. The file may be gzipped, and may be one JSON array of such objects.
"""

import collections
import dataclasses
import functools
import logging

from lavit_jax.core import errors, image_io
from lavit_jax.core.storage import files
from lavit_jax.data import examples, faults
from lavit_jax.data.records import forms, held_out, lines

_LOG = logging.getLogger(__name__)
_KEPT_BYTES = 256 << 20  # of decoded images; small sets are decoded once
_PROBED = 20  # images looked for before a wrong folder is reported


class JsonlSource:
  """A Source from a JSON-lines file; images are decoded when asked for.

  Bad lines are skipped, counted and named in `faults`; the file is refused
  when their share passes `limit_share`. `unread` tells of fields with text
  that are not known: {field: [lines, number of the first, what it says]}.
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
    """Reads the file, not the images.

    Args:
      path: the JSON-lines file, here or on gs://; its images lie there too.
      image_size: images are resized to this square.
      split: "all", or "train" / "held_out" by a hash of each line's first
        image (or text); lines that share images stay together, so that no
        image is in both: see `held_out.choose`.
      held_out_share: share of the lines that is held out.
      only: dict of fields that a line must have with these values, such as
        {"split": "train"}.
      limit: use the first so many lines that fit.
      allow_absolute: let images lie outside the file's folder.
      limit_share: share of bad lines that is an error.

    Raises:
      errors.DataError: no such file, or of another kind; nothing usable in it,
        too many bad lines, or none of the images there.
      errors.ConfigError: no such split.
    """
    self.path, self.image_size = files.place(path), int(image_size)
    self.name = self.path.name
    self.faults = faults.FaultLog(f"lines of {self.name}", limit_share)
    self._images, self._captions = {}, collections.defaultdict(list)
    self._questions = collections.defaultdict(list)
    self._examples = {task: [] for task in examples.TASKS}
    reader = forms.Reader(self.name, allow_absolute, only or ())
    self._read(reader, split, held_out_share, only or {}, limit)
    self.faults.check()
    self.unread = reader.unread
    if told := reader.report():
      _LOG.warning("%s", told)
    self._paths = list(self._images)
    self.num_images = len(self._paths)
    self._check_found(split, only)
    kept = max(1, _KEPT_BYTES // (3 * self.image_size**2))
    self._decoded = functools.lru_cache(maxsize=kept)(self._decode)

  def _read(self, reader, split, held_out_share, only, limit):
    """Takes in the lines that are chosen; bad ones go to `faults`."""
    if split not in ("all", "train", "held_out"):
      raise errors.ConfigError(
        f"split={split!r}: a JSON-lines file has all, train and held_out; use"
        " only={'split': …} to go by a field of the file."
      )
    # Which half a line is in depends on the lines behind it too.
    last = limit if split == "all" else None
    keys, entries = [], []
    for number, row in lines.rows(self.path):
      if last is not None and len(entries) >= last:
        break
      try:
        if isinstance(row, lines.BadLine):
          raise row
        if any(row.get(k) != v for k, v in only.items()):
          continue
        entries.append(reader.entry(number, row))
        keys.append(f"{self.name}:{number}")
        self.faults.good()
      except lines.BadLine as error:
        self.faults.fault(f"{self.name}:{number}", error)
    chosen = range(len(entries))
    if split != "all":
      held = held_out.choose(entries, held_out_share)
      chosen = [i for i in chosen if held[i] == (split == "held_out")]
    for i in chosen[:limit]:
      self._add(entries[i], keys[i])

  def image(self, i):
    """Image i as uint8[size, size, 3]; images.ImageError for a bad one."""
    return self._decoded(i)

  def _decode(self, i):
    loaded = image_io.load(self.image_path(i))
    pixels = image_io.to_uint8(loaded, self.image_size)
    pixels.flags.writeable = False  # it is handed out more than once
    return pixels

  def image_path(self, i):
    """Where image i lies."""
    return self.path.parent / self._paths[i]

  def encoded(self, i):
    """Image i at its own size, as `images.load` takes it."""
    return self.image_path(i)

  def image_key(self, i):
    """The path of image i as the file gives it."""
    return self._paths[i]

  def captions(self, i):
    """The captions of image i, list[str]."""
    return list(self._captions[i]) if i in self._captions else []

  def questions(self, i):
    """The questions about image i: list of (type, question, answer)."""
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

  def _add(self, entry, key):
    """Takes a checked entry in: images by number, examples by task."""

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
    """Refuses a file without examples, or whose images lie elsewhere."""
    if not self.tasks() and not self.num_images:
      raise errors.DataError(
        f"{self.path}: no usable line for split={split!r}, only={only}; it"
        f" has {self.faults.seen} lines. Choose another split (or give a file"
        " of its own as config.data.held_out_path), or add lines such as"
        ' {"image": "a.jpg", "caption": "a cat"}.'
      )
    first = [self.image_path(i) for i in range(min(self.num_images, _PROBED))]
    if first and not any(p.exists() for p in first):
      raise errors.DataError(
        f"{self.path}: none of its first {len(first)} images is there, such"
        f" as {first[0]}; paths are relative to the folder of the file."
      )
