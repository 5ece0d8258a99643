"""Small stand-ins: a tokenizer, a source and a cache made of plain numbers."""

import hashlib
import pathlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from lavit_jax.core import image_io
from lavit_jax.data import examples, sequences
from lavit_jax.data.caches import codes as codes_lib

SIZE = 4  # pixels a side
PATCHES = 9
CODES = 32


class Words:
  """Every word is an id from 3 on; pickles, as grain's workers need it."""

  size = 200

  def encode(self, text: str) -> list[int]:
    return [3 + sum(word.encode()) % 190 for word in text.split()]

  def lengths(self, texts: Sequence[str]) -> list[int]:
    return [len(self.encode(text)) for text in texts]


class Source:
  """`documents[task]` are tuples of parts; image i is filled with i."""

  name = "fake"
  image_size = SIZE

  def __init__(
    self,
    documents: Mapping[str, Sequence[tuple[examples.Part, ...]]],
    num_images: int = 20,
    bad: Collection[int] = (),
  ):
    self.documents, self.num_images, self.bad = documents, num_images, bad

  def contents(self) -> str:
    digest = hashlib.sha256(repr((self.documents, self.num_images)).encode())
    return digest.hexdigest()

  def image(self, i: int) -> np.ndarray:
    if i in self.bad:
      raise image_io.ImageError(f"image {i} is bad")
    return np.full((SIZE, SIZE, 3), i, np.uint8)

  def image_key(self, i: int) -> str:
    return f"image{i}"

  def captions(self, i: int) -> list[str]:
    return [f"caption {i}", f"another {i}"]

  def tasks(self) -> tuple[str, ...]:
    return tuple(self.documents)

  def num_examples(self, task: str) -> int:
    return len(self.documents.get(task, ()))

  def example(self, task: str, i: int) -> examples.Example:
    return examples.Example(f"{task}/{i}", task, self.documents[task][i])


class Cache:
  """Image i keeps its first counts[i] patches and has codes i, i + 1, …"""

  directory = pathlib.Path("fake")

  def __init__(self, counts: Sequence[int] | np.ndarray):
    self.counts = np.array(counts, np.int32)
    self.num_patches = PATCHES
    self.meta = codes_lib.Meta(
      source="fake",
      tokenizer="fake",
      num_images=len(counts),
      num_patches=PATCHES,
      num_codes=CODES,
    )

  def __len__(self) -> int:
    return len(self.counts)

  def keep(self, i: int) -> np.ndarray:
    return np.arange(PATCHES) < self.counts[i]

  def codes(self, i: int) -> np.ndarray:
    return (i + np.arange(max(self.counts[i], 0))) % CODES


# For mypy: `examples_test.py` has it check that the fakes fit the protocols.
_SOURCE: examples.Source = Source({})
_CACHE: sequences.Codes = Cache([])
