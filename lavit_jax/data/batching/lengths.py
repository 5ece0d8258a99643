"""How long every example is, computed once.

A plan of rows needs the lengths of all documents; their texts only where they
are trained on. So lengths are columns: for each example of a task the ids of
its texts, and its images, whose codes a code cache counts. Columns of many
examples are kept beside the indexes of archives (`indexes/stored.py`), under a
digest of the texts and the tokenizer.
"""

import collections
import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import pickle
import secrets
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lavit_jax.core import errors, progress
from lavit_jax.core import vocabulary as vocabulary_lib
from lavit_jax.core.storage import array_files
from lavit_jax.data import contents, examples, sequences
from lavit_jax.data.indexes import stored

_LOG = logging.getLogger(__name__)
_RULES = 1  # of lengths, for what is kept
_KEPT = 50_000  # examples whose lengths are worth keeping
_CHUNK = 2048  # examples tokenized together
_SOME = 2  # ids of an image, where only those of texts matter
BAD = -1  # in place of a length: the example cannot be used


class _OneCode:
  """Stands for a code cache where the codes of images are left out."""

  def __init__(self):
    self.counts = collections.defaultdict(lambda: 1)


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Lengths of the n examples of a task.

  Attributes:
    text: int32[n], ids of the texts, </s> included; BAD for an example that
      cannot be used.
    reads: int32[n], images that are read, each counted once.
    ends: int64[n], where the images of each example end in `images`.
    images: int32[m], the images in the order of the examples.
  """

  text: np.ndarray
  reads: np.ndarray
  ends: np.ndarray
  images: np.ndarray

  def sizes(
    self, chosen: np.ndarray, counts: np.ndarray | None = None
  ) -> np.ndarray:
    """Returns the sizes of some examples as sequences.

    Args:
      chosen: int64[k], examples.
      counts: int[num_images], codes of each image; less than 1: a bad one. None
        where no example has images.

    Returns:
      int64[k, 2], positions and images read; BAD where an example has a bad
      text or a bad image.
    """
    out = np.stack([self.text[chosen] - 1, self.reads[chosen]], axis=1)
    out = out.astype(np.int64)
    bad = self.text[chosen] == BAD
    if counts is not None:
      ends = self.ends[chosen]
      starts = np.where(chosen > 0, self.ends[chosen - 1], 0)
      owner, places = _ranges(starts, ends)
      codes = counts[self.images[places]].astype(np.int64)
      out[:, 0] += np.bincount(
        owner, weights=codes + 2, minlength=len(chosen)
      ).astype(np.int64)
      bad |= np.bincount(owner[codes < 1], minlength=len(chosen)) > 0
    out[bad] = BAD
    return out


def _ranges(starts, ends):
  """Returns (which range, number in it) of all numbers in some ranges."""
  sizes = ends - starts
  owner = np.repeat(np.arange(len(sizes)), sizes)
  before = np.cumsum(sizes) - sizes
  return owner, np.arange(len(owner)) + (starts - before)[owner]


def of(
  source: examples.Source,
  task: str,
  tokenizer: vocabulary_lib.TextTokenizer,
) -> Lengths:
  """Returns the lengths of all examples of a task; kept if they are many.

  Args:
    source: an examples.Source.
    task: one of its tasks.
    tokenizer: of the texts.
  """
  if source.num_examples(task) < _KEPT:
    return computed(source, task, tokenizer)
  what = (_RULES, task, contents.of(source))
  digest = hashlib.sha256(repr(what).encode() + pickle.dumps(tokenizer))
  folder = stored.folder() / "lengths" / digest.hexdigest()[:32]
  found = _read(folder, source.num_examples(task))
  if found is None:
    found = computed(source, task, tokenizer)
    _write(folder, found)
  return found


def computed(
  source: examples.Source,
  task: str,
  tokenizer: vocabulary_lib.TextTokenizer,
  chosen: np.ndarray | None = None,
) -> Lengths:
  """Returns the lengths of examples of a task, computed anew.

  Args:
    source: an examples.Source.
    task: one of its tasks.
    tokenizer: of the texts.
    chosen: int64[n], which examples; all by default.
  """
  if chosen is None:
    chosen = np.arange(source.num_examples(task))
  count = len(chosen)
  text, reads = np.empty(count, np.int32), np.empty(count, np.int32)
  ends, images = np.empty(count, np.int64), []
  bar: Any = contextlib.nullcontext()
  if count >= _KEPT:
    label = f"lengths of {count} examples of {source.name}"
    bar = progress.Progress(count, label=label)
  total = 0
  with bar:
    for start in range(0, count, _CHUNK):
      stop = min(start + _CHUNK, count)
      numbers = chosen[start:stop].tolist()
      some = [source.example(task, i) for i in numbers]
      text[start:stop] = _text_lengths(some, tokenizer)
      for i, example in enumerate(some, start):
        found = [
          part for part in example.parts if isinstance(part, examples.ImagePart)
        ]
        reads[i] = len({part.image for part in found if not part.write})
        total += len(found)
        ends[i] = total
        images.append(np.array([part.image for part in found], np.int32))
      images = [np.concatenate(images)]
      if count >= _KEPT:
        bar.update(stop)
  return Lengths(text, reads, ends, np.concatenate([*images, _NO_IMAGE]))


_NO_IMAGE = np.empty(0, np.int32)


def _text_lengths(some: Sequence[examples.Example], tokenizer) -> list[int]:
  """Returns the ids of the texts of each example, BAD if it is unusable.

  Texts are encoded together, on all cores.
  """
  texts = [_separate(example) for example in some]
  together = [text for found in texts for text in found or ()]
  try:
    counts = iter(tokenizer.lengths(together))
  except vocabulary_lib.BadText:
    return [_one_by_one(example, tokenizer) for example in some]
  return [
    _one_by_one(example, tokenizer)
    if found is None
    else _sum(example, [next(counts) for _ in found])
    for example, found in zip(some, texts, strict=True)
  ]


def _separate(example) -> list[str] | None:
  """Returns the texts of an example as `sequences.text_ids` encodes them.

  None if one depends on the one before it.
  """
  texts, before = [], ""
  for part in example.parts:
    if isinstance(part, examples.ImagePart):
      before = ""
      continue
    if before:
      return None
    before = part.text
    texts.append(part.text.removeprefix(" "))
  return texts


def _sum(example, counts: Iterable[int]) -> int:
  """Returns the length of texts of such lengths; see `sequences.spans`."""
  counts = iter(counts)
  used: list[tuple[examples.Part, int]] = []
  for part in example.parts:
    is_text = isinstance(part, examples.TextPart)
    count = next(counts) if is_text else _SOME
    if count:
      used.append((part, count))
    elif example.task != "document":
      return BAD
  if not used:
    return BAD
  last, count = used[-1]
  if isinstance(last, examples.TextPart):
    used[-1] = last, count + 1  # </s>
  # The very first id is no target.
  if not any(part.weight and (n > 1 or i) for i, (part, n) in enumerate(used)):
    return BAD
  return sum(n for part, n in used if isinstance(part, examples.TextPart))


def _one_by_one(example, tokenizer) -> int:
  """Returns the ids of the texts of an example, BAD if it is unusable."""
  cache: Any = _OneCode()
  try:
    spans = sequences.spans(example, cache, tokenizer)
  except sequences.Unusable:
    return BAD
  return sum(span.count for span in spans if span.ids is not None)


def _read(folder: pathlib.Path, count: int) -> Lengths | None:
  """Returns kept lengths, on the disk; None if there are none of them."""
  if not folder.is_dir():
    return None
  try:
    columns = {
      field.name: array_files.read(folder / f"{field.name}.npy", mapped=True)
      for field in dataclasses.fields(Lengths)
    }
    if any(len(columns[name]) != count for name in ("text", "reads", "ends")):
      raise ValueError("its length is another")
    if len(columns["images"]) != columns["ends"][-1]:
      raise ValueError("its images are others")
  except (OSError, ValueError, EOFError) as error:
    _LOG.warning("%s is damaged (%s) and made again", folder, error)
    shutil.rmtree(folder, ignore_errors=True)
    return None
  return Lengths(**columns)


def _write(folder: pathlib.Path, found: Lengths) -> None:
  """Keeps lengths, if their folder can be written."""
  unfinished = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.tmp")
  try:
    unfinished.mkdir(parents=True)
    for field in dataclasses.fields(Lengths):
      np.save(unfinished / f"{field.name}.npy", getattr(found, field.name))
    os.rename(unfinished, folder)
  except OSError as error:
    if folder.is_dir():  # another process was faster
      return
    _LOG.warning(
      "The lengths of texts could not be kept in %s (%s): they are computed"
      " again by the next run. LAVIT_INDEXES names another folder.",
      folder.parent,
      error,
    )
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def require_codes(
  source: examples.Source, task: str, lengths: Lengths, cache: Any
) -> None:
  """Checks that there is a code cache if examples have images.

  Raises:
    errors.DataError: there is none.
  """
  if cache is not None or not len(lengths.images):
    return
  first = int(np.argmax(lengths.ends > 0))
  raise errors.DataError(
    f"Example {source.example(task, first).key} has an image, but its source"
    " has no code cache. Run `lavit tokenize --data … --out DIR` and give DIR"
    " as its cache."
  )
