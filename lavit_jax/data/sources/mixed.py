"""Several sources as one, for runs that are trained on a mixture.

Images and examples of the parts follow one another, so that whatever takes a
source takes a mixture. How often each part is drawn is decided by those who
draw: `batching/pipeline.py` for packed rows and for single images.
"""

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lavit_jax.core import errors
from lavit_jax.data import contents, examples


@dataclasses.dataclass(frozen=True)
class Part:
  """One of the sources of a mixture.

  Attributes:
    name: of the part, in config.data.sources.
    source: its images and examples.
    weight: share of the documents, relative to the other parts.
    mixture: weight of each task among the documents of this part.
  """

  name: str
  source: examples.Source
  weight: float
  mixture: Mapping[str, float]


class MixedSource:
  """The images and examples of several sources, one after the other.

  Attributes:
    parts: the sources.
    name: of all, for messages.
    image_size: height and width of the images, in pixels.
    num_images: number of images of all parts.
  """

  def __init__(self, parts: Sequence[Part]) -> None:
    """Puts sources together.

    Raises:
      errors.ConfigError: there are none, or their images differ in size.
    """
    self.parts = tuple(parts)
    if not self.parts:
      raise errors.ConfigError("config.data.sources is empty. Name a source.")
    sizes = {part.name: part.source.image_size for part in self.parts}
    if len(set(sizes.values())) > 1:
      raise errors.ConfigError(
        f"The sources of a mixture must agree on image_size, got {sizes}."
      )
    self.name = "+".join(part.name for part in self.parts)
    self.image_size = self.parts[0].source.image_size
    self._images = _starts(part.source.num_images for part in self.parts)
    self.num_images = self._images[-1]
    self._examples = {
      task: _starts(part.source.num_examples(task) for part in self.parts)
      for task in examples.TASKS
    }

  def _image(self, i):
    """Returns (part, number of image i in it)."""
    return self._find(self._images, i)

  def _find(self, starts, i):
    if not 0 <= i < starts[-1]:
      raise IndexError(f"{i} is not among {starts[-1]}")
    which = bisect.bisect_right(starts, i) - 1
    return which, i - starts[which]

  def image(self, i: int) -> np.ndarray:
    """Returns image i, uint8[size, size, 3]; ImageError for a bad one."""
    which, number = self._image(i)
    return self.parts[which].source.image(number)

  def image_key(self, i: int) -> str:
    """Returns the name of image i: that of its part, and its own in that."""
    which, number = self._image(i)
    part = self.parts[which]
    return f"{part.name}/{part.source.image_key(number)}"

  def encoded(self, i: int) -> Any:
    """Returns image i as `image_io.load` takes it."""
    which, number = self._image(i)
    source = self.parts[which].source
    if isinstance(source, examples.HasEncodedImages):
      return source.encoded(number)
    return source.image(number)

  def captions(self, i: int) -> list[str]:
    """Returns the captions of image i, possibly none."""
    which, number = self._image(i)
    return self.parts[which].source.captions(number)

  def tasks(self) -> tuple[str, ...]:
    """Returns the tasks that some part has examples of."""
    return tuple(t for t in examples.TASKS if self.num_examples(t))

  def num_examples(self, task: str) -> int:
    """Returns the number of examples of a task in all parts."""
    return self._examples[task][-1] if task in self._examples else 0

  def example(self, task: str, i: int) -> examples.Example:
    """Returns example i of a task, with images numbered as those of all."""
    which, number = self._find(self._examples[task], i)
    example = self.parts[which].source.example(task, number)
    start = self._images[which]
    return dataclasses.replace(
      example,
      key=f"{self.parts[which].name}/{example.key}",
      parts=tuple(_moved(part, start) for part in example.parts),
    )

  @property
  def usable(self) -> np.ndarray:
    """Returns the images that the parts have for use, int32[n]."""
    found = [
      examples.usable(part.source) + start
      for part, start in zip(self.parts, self._images[:-1], strict=True)
    ]
    return np.concatenate(found).astype(np.int32)

  def fingerprint(self) -> str:
    """Returns a digest of the images' names, their order and size."""
    return self._digest(examples.fingerprint)

  def contents(self) -> str:
    """Returns a digest of the images' names, the texts and their order."""
    return self._digest(contents.of)

  def stored(self) -> str:
    """Returns a digest of where the images of those are that say so."""
    return self._digest(
      lambda source: (
        source.stored() if isinstance(source, examples.HasStorage) else ""
      )
    )

  def _digest(self, of):
    found = [(part.name, of(part.source)) for part in self.parts]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:32]


def _starts(counts):
  """Returns where each part begins, and where the last one ends."""
  return list(itertools.accumulate(counts, initial=0))


def _moved(part, start):
  """Returns a part of an example whose images are numbered from `start`."""
  if isinstance(part, examples.ImagePart):
    return dataclasses.replace(part, image=part.image + start)
  return part
