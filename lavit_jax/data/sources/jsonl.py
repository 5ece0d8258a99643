"""Reads a user's own data, one JSON object a line, as a Source.

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
for text; "document" for messages. A field that is null or NaN counts as
absent, and so does an empty text.

In messages an image is read, unless it comes last, has "write": true, or is
the assistant's. An <image> in their texts (or a part {"type": "image"} without
a path) stands for the next of the line's "images", or for its "image"; there
must be as many. Texts keep their white space, except around <image>; empty
ones are skipped. The texts of the user ("human") and of the system are read
and not learnt; after each answer of the assistant ("gpt") its end is learnt.

Of several answers the most frequent is learnt; they may have VQA's form,
{"answer": "red"}; numbers become texts, true and false become yes and no.

A line that cannot be read as meant is reported with its number. It counts as
bad where it would be taken for something else (half a character of an emoji in
a text; words beside an image under an unknown name) or where a field above
would be lost. A line that can be read except for an unknown field with text is
part of one warning. The file may be gzipped, and may be one JSON array of such
objects.
"""

import collections
import dataclasses
import functools
import glob
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import files
from lavit_jax.data import examples, faults
from lavit_jax.data.images import decoding
from lavit_jax.data.records import forms, held_out, lines

_LOG = logging.getLogger(__name__)
_MAX_DECODED = 256 << 20  # bytes of images kept; small sets are decoded once
_NUM_PROBED = 20  # images looked for before a wrong folder is reported


class JsonlSource:
  """A Source from a JSON-lines file; images are decoded when asked for.

  Bad lines are skipped, counted and logged in `faults`; the file is refused
  when their share exceeds `limit_share`.

  Attributes:
    path: of the file.
    name: of the file, without its folder.
    image_size: height and width of the images, in pixels.
    num_images: number of images.
    faults: the FaultLog of bad lines.
    unread: unknown fields that hold text: name -> [number of lines, number of
      the first one, its value].
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    image_size: int,
    *,
    split: str = "all",
    held_out_share: float = 0.1,
    only: Mapping[str, Any] | None = None,
    limit: int | None = None,
    allow_absolute: bool = False,
    limit_share: float = faults.LIMIT_SHARE,
    decode: decoding.Decode = decoding.exact,
  ) -> None:
    """Reads the file, not the images.

    Args:
      path: the JSON-lines file, here or on gs://; its images lie there too.
      image_size: images are resized to this square.
      split: "all", or "train" / "held_out" by a hash of each line's first
        image (or text); lines that share images stay together, so that no
        image is in both: see `held_out.choose`.
      held_out_share: share of the lines that is held out.
      only: fields that a line must have with these values, such as
        {"split": "train"}.
      limit: use only the first `limit` lines of the split.
      allow_absolute: let images lie outside the file's folder.
      limit_share: share of bad lines above which the file is refused.
      decode: makes the square of an encoded image.

    Raises:
      errors.DataError: there is no such file, or it is of another kind; it has
        no usable line or too many bad ones, or none of its images exists.
      errors.ConfigError: there is no such split.
    """
    self.path, self.image_size = files.input_path(path), int(image_size)
    self.name, self._square = self.path.name, decode
    self.faults = faults.FaultLog(f"lines of {self.name}", limit_share)
    self._images: dict[str, int] = {}
    self._captions: dict[int, list[str]] = collections.defaultdict(list)
    self._questions: dict[int, list[forms.Question]]
    self._questions = collections.defaultdict(list)
    self._examples: dict[str, list[examples.Example]] = {
      task: [] for task in examples.TASKS
    }
    reader = forms.Reader(self.name, allow_absolute, only or ())
    self._read(reader, split, held_out_share, only or {}, limit)
    self.faults.check()
    self.unread = reader.unread
    if report := reader.report():
      _LOG.warning("%s", report)
    self._paths = list(self._images)
    self.num_images = len(self._paths)
    self._check_usable(split, only)
    kept = max(1, _MAX_DECODED // (3 * self.image_size**2))
    self._decoded: Callable[[int], np.ndarray] = functools.lru_cache(
      maxsize=kept
    )(self._decode)

  def decode_anew(self) -> None:
    """Keeps no decoded images from now on, so that decoding is measured."""
    self._decoded = self._decode

  def _read(self, reader, split, held_out_share, only, limit):
    """Adds the lines of the split; bad ones go to `faults`."""
    if split not in ("all", "train", "held_out"):
      raise errors.ConfigError(
        f"split={split!r}: a JSON-lines file has all, train and held_out; use"
        " only={'split': …} to select lines by a field of the file."
      )
    # Which split a line is in depends on the lines after it too.
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

  def image(self, i: int) -> np.ndarray:
    """Returns image i, uint8[size, size, 3]; ImageError for a bad one."""
    return self._decoded(i)

  def _decode(self, i):
    pixels = self._square(self.image_path(i), self.image_size, None)
    pixels.flags.writeable = False  # callers share it
    return pixels

  def image_path(self, i: int) -> os.PathLike[str]:
    """Returns the path of image i."""
    return self.path.parent / self._paths[i]

  def encoded(self, i: int) -> os.PathLike[str]:
    """Returns the path of image i, for `image_io.load`."""
    return self.image_path(i)

  def image_key(self, i: int) -> str:
    """Returns the path of image i as the file has it."""
    return self._paths[i]

  def captions(self, i: int) -> list[str]:
    """Returns the captions of image i."""
    return list(self._captions[i]) if i in self._captions else []

  def questions(self, i: int) -> list[forms.Question]:
    """Returns the questions about image i: (type, question, answer)."""
    return list(self._questions[i]) if i in self._questions else []

  def tasks(self) -> tuple[str, ...]:
    """Returns the tasks this file has examples of."""
    return tuple(t for t in examples.TASKS if self._examples[t])

  def num_examples(self, task: str) -> int:
    """Returns the number of examples of a task, 0 if there are none."""
    return len(self._examples.get(task, ()))

  def example(self, task: str, i: int) -> examples.Example:
    """Returns example i of a task."""
    return self._examples[task][i]

  def _add(self, entry, key):
    """Adds a checked entry: images by number, examples by task."""

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
      for instruction, result in entry.edits:
        put(examples.edit(key, i, instruction, number(result)))
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

  def _check_usable(self, split, only):
    """Refuses a file without examples, or whose images do not exist."""
    if not self.tasks() and not self.num_images:
      raise errors.DataError(
        f"{self.path}: no usable line for split={split!r}"
        f"{f', only={only}' if only else ''}; it"
        f" has {self.faults.seen} lines. Choose another split (or give a file"
        " of its own as config.data.held_out_path), or add lines such as"
        ' {"image": "a.jpg", "caption": "a cat"}.'
      )
    first = [
      self.image_path(i) for i in range(min(self.num_images, _NUM_PROBED))
    ]
    if first and not any(p.exists() for p in first):
      raise errors.DataError(
        f"{self.path}: none of its first {len(first)} images exists, such"
        f" as {first[0]}; paths are relative to the folder of the file."
        f"{self._elsewhere(first[0].name)}"
      )

  def _elsewhere(self, name) -> str:
    """Returns where an image is, if it is beside the folder of the file."""
    root = self.path.parent.parent
    if files.is_remote(root):
      return ""
    found = next(iter(sorted(root.glob(f"*/{glob.escape(name)}"))), None)
    if found is None:
      return ""
    return f" It is in {found.parent}: copy {self.name} to {root}."
