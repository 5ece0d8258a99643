"""Datasets as images by index and examples that refer to them.

A source holds images and texts; it knows neither tokenizer nor sequences. An
example is a list of parts in reading order; `sequences.build` turns it into
tokens.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

TASKS = ("image_text", "text_image", "edit", "vqa", "document", "text")
QUESTION = "Question: {} Answer:"  # prompt of LaVIT's own evaluation
# Loss weight of an answer's tokens: an answer has one or two of them, a
# caption or an image about fifteen.
ANSWER_WEIGHT = 4.0


# `contents.of` hashes the repr of examples, so that a run notices changed
# data: names of these classes, names and order of their fields stay.
@dataclasses.dataclass(frozen=True)
class TextPart:
  """A piece of text.

  Attributes:
    text: the text.
    weight: loss weight of each of its tokens.
    end: whether </s> is the target of its last token even if another part
      follows, as at the end of an answer within a dialogue.
  """

  text: str
  weight: float = 1.0
  end: bool = False


@dataclasses.dataclass(frozen=True)
class ImagePart:
  """An image.

  Attributes:
    image: index of the image in its source.
    write: False for a condition, read as continuous tokens; True for a target,
      written as code ids.
    weight: loss weight of its code targets and of [IMG] and [/IMG].
    optional: whether the example is of use without it, where it cannot be read.
  """

  image: int
  write: bool
  weight: float = 1.0
  optional: bool = dataclasses.field(default=False, repr=False)


Part = TextPart | ImagePart


@dataclasses.dataclass(frozen=True)
class Example:
  """One document.

  Attributes:
    key: its name in logs.
    task: one of TASKS.
    parts: in reading order.
  """

  key: str
  task: str
  parts: tuple[Part, ...]


@runtime_checkable
class Source(Protocol):
  """A random-access dataset of images, and of examples of each task.

  Every method is a pure function of its arguments and may be called from any
  thread, so that a row of training data depends only on its number.

  A source may also be a `HasEncodedImages`, `HasStorage`, `HasFingerprint` or
  `HasContents`; one that is read from a file has its location as `path`.
  """

  @property
  def name(self) -> str:
    """Name of the dataset, for messages and fingerprints."""

  @property
  def image_size(self) -> int:
    """Height and width of all images, in pixels."""

  @property
  def num_images(self) -> int:
    """Number of images."""

  def image(self, i: int) -> np.ndarray:
    """Returns image i, uint8[image_size, image_size, 3].

    Raises:
      image_io.ImageError: the image is missing or cannot be decoded.
    """

  def image_key(self, i: int) -> str:
    """Returns the name of image i, for logs and fingerprints."""

  def captions(self, i: int) -> list[str]:
    """Returns the captions of image i, possibly none."""

  def tasks(self) -> tuple[str, ...]:
    """Returns the tasks that this source has examples of, in a fixed order."""

  def num_examples(self, task: str) -> int:
    """Returns the number of examples of a task."""

  def example(self, task: str, i: int) -> Example:
    """Returns example i of a task; decodes no image."""


@runtime_checkable
class HasEncodedImages(Protocol):
  """A source whose images exist at their own size, not only as squares."""

  def encoded(self, i: int) -> Any:
    """Returns image i as `image_io.load` takes it: a path, or bytes."""


@runtime_checkable
class HasFields(Protocol):
  """A source whose images have a json with more about them."""

  def fields(self, i: int) -> Mapping[str, Any]:
    """Returns the json of image i; {} if it has none."""


@runtime_checkable
class HasStates(Protocol):
  """A source that knows when its files change."""

  def states(self) -> str:
    """Returns what changes whenever a file of the source does."""


@runtime_checkable
class HasUsable(Protocol):
  """A source of which only some images are to be used."""

  @property
  def usable(self) -> np.ndarray:
    """Returns the numbers of these images in order, int[n]."""


def usable(source: Source) -> np.ndarray:
  """Returns the numbers of the images that are to be used, int32[n]."""
  if isinstance(source, HasUsable):
    return source.usable
  return np.arange(source.num_images, dtype=np.int32)


@runtime_checkable
class HasStorage(Protocol):
  """A source that knows where its images are stored."""

  def stored(self) -> str:
    """Returns a digest of the files and fields that hold the images."""


@runtime_checkable
class HasFingerprint(Protocol):
  """A source with too many images to hash their names one by one."""

  def fingerprint(self) -> str:
    """Returns a digest of the images' names, their order and size."""


@runtime_checkable
class HasContents(Protocol):
  """A source that computes the digest of its contents itself."""

  def contents(self) -> str:
    """Returns a digest of the images' names, the texts and their order."""


def image_text(key: str, image: int, caption: str) -> Example:
  """Returns an example that reads an image and writes its caption."""
  parts = (ImagePart(image, write=False), TextPart(caption))
  return Example(key, "image_text", parts)


def text_image(key: str, image: int, caption: str) -> Example:
  """Returns an example that reads a caption and writes its image."""
  parts = (TextPart(caption), ImagePart(image, write=True))
  return Example(key, "text_image", parts)


# A caption is learnt in both directions.
OF_CAPTIONS = {"image_text": image_text, "text_image": text_image}


def vqa(key: str, image: int, question: str, answer: str) -> Example:
  """Returns an example that reads an image and a question.

  Only the answer is learnt.
  """
  return dialogue(key, image, [(question, answer)])


def dialogue(key: str, image: int, turns: Iterable[tuple[str, str]]) -> Example:
  """Returns a vqa example of one image and several questions about it.

  Only answers are learnt. Questions have no weight, so the only thing that is
  learnt to follow an answer is the end: a single question is answered like the
  first of several.

  Args:
    key: name of the example in logs.
    image: index of the image.
    turns: (question, answer) pairs.
  """
  parts: list[Part] = [ImagePart(image, write=False, weight=0.0)]
  for question, answer in turns:
    parts.append(TextPart(QUESTION.format(question), weight=0.0))
    parts.append(TextPart(" " + answer, weight=ANSWER_WEIGHT))
  return Example(key, "vqa", tuple(parts))


def edit(key: str, image: int, instruction: str, result: int) -> Example:
  """Returns an example that reads an image and an instruction.

  The changed image, number `result`, is written.
  """
  parts = (
    ImagePart(image, write=False, weight=0.0),
    TextPart(instruction, weight=0.0),
    ImagePart(result, write=True),
  )
  return Example(key, "edit", parts)


def text(key: str, content: str) -> Example:
  """Returns an example of plain text."""
  return Example(key, "text", (TextPart(content),))


def fingerprint(source: Source) -> str:
  """Returns a hex digest of which images a source has, at which size.

  A code cache stores it, so that codes of one dataset are never taken for
  those of another. Covers names and order; of the pixels see `image_bytes.py`.
  """
  if isinstance(source, HasFingerprint):
    return source.fingerprint()
  digest = hashlib.sha256()
  head = (source.name, source.image_size, source.num_images)
  digest.update(repr(head).encode())
  for i in range(source.num_images):
    digest.update(source.image_key(i).encode() + b"\n")
  return digest.hexdigest()[:32]
