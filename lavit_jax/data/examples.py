"""What a dataset is: images by index, and examples that point at them.

A source knows images and words, never a tokenizer or a sequence. An example
is a list of parts in reading order; `sequences.build` turns it into tokens.
"""

import dataclasses
import hashlib
from typing import Protocol, runtime_checkable

import numpy as np

TASKS = ("image_text", "text_image", "edit", "vqa", "document", "text")
QUESTION = "Question: {} Answer:"  # the prompt of LaVIT's own evaluation
# Loss weight of an answer's tokens: it is one or two of them, where a caption
# or an image is fifteen.
ANSWER_WEIGHT = 4.0


@dataclasses.dataclass(frozen=True)
class TextPart:
  """A run of text; `weight` is the loss weight of each of its tokens.

  end: its last token learns </s> as what follows it, though another part
  does: the end of an answer within a dialogue.
  """

  text: str
  weight: float = 1.0
  end: bool = False


@dataclasses.dataclass(frozen=True)
class ImagePart:
  """An image: index `image` of the source.

  write=False: a condition, read as continuous tokens; write=True: a target,
  written as code ids. `weight` is the loss weight of its code targets and of
  the two image tokens round it.
  """

  image: int
  write: bool
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Example:
  """One document: `key` names it in logs, `task` is one of TASKS."""

  key: str
  task: str
  parts: tuple


@runtime_checkable
class Source(Protocol):
  """A random-access dataset of images and of examples by task.

  Every method is a pure function of its arguments, so that a row of training
  data depends on nothing but its number.
  """

  name: str
  image_size: int
  num_images: int

  def image(self, i: int) -> np.ndarray:
    """Image i as uint8[size, size, 3]; images.ImageError for a bad one."""

  def image_key(self, i: int) -> str:
    """Name of image i for logs and fingerprints."""

  def captions(self, i: int) -> list:
    """The captions of image i, list[str], possibly empty."""

  def tasks(self) -> tuple:
    """The tasks this source has examples of, in a fixed order."""

  def num_examples(self, task: str) -> int:
    """Number of examples of a task."""

  def example(self, task: str, i: int) -> Example:
    """Example i of a task, without decoding an image."""


def image_text(key, image, caption):
  """An image is read, its caption is written."""
  parts = (ImagePart(image, write=False), TextPart(caption))
  return Example(key, "image_text", parts)


def text_image(key, image, caption):
  """A caption is read, its image is written."""
  parts = (TextPart(caption), ImagePart(image, write=True))
  return Example(key, "text_image", parts)


def vqa(key, image, question, answer):
  """An image and a question are read, the answer alone is learnt."""
  return dialogue(key, image, [(question, answer)])


def dialogue(key, image, turns):
  """An image and questions on it, a vqa example; the answers are learnt.

  `turns` are (question, answer) pairs. Questions have no weight, so the one
  thing learnt to follow an answer is the end: a question alone is answered as
  the first of several is.
  """
  parts = [ImagePart(image, write=False, weight=0.0)]
  for question, answer in turns:
    parts.append(TextPart(QUESTION.format(question), weight=0.0))
    parts.append(TextPart(" " + answer, weight=ANSWER_WEIGHT))
  return Example(key, "vqa", tuple(parts))


def edit(key, image, instruction, result):
  """An image and an instruction are read, the changed image is written."""
  parts = (
    ImagePart(image, write=False, weight=0.0),
    TextPart(instruction, weight=0.0),
    ImagePart(result, write=True),
  )
  return Example(key, "edit", parts)


def text(key, words):
  """Plain text."""
  return Example(key, "text", (TextPart(words),))


def fingerprint(source) -> str:
  """Hex digest of which images a source holds, at which size.

  A code cache records it, so that codes of one dataset are never taken for
  those of another. Covers names and order, not pixels: `image_bytes.py`.
  """
  digest = hashlib.sha256()
  head = (source.name, source.image_size, source.num_images)
  digest.update(repr(head).encode())
  for i in range(source.num_images):
    digest.update(source.image_key(i).encode() + b"\n")
  return digest.hexdigest()[:32]
