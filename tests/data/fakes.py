"""Small stand-ins: a source, a tokenizer and a cache made of plain numbers."""

import pathlib

import numpy as np

from lavit_jax.core import image_io
from lavit_jax.data import examples
from lavit_jax.data.caches import codes as codes_lib

SIZE = 4  # pixels a side
PATCHES = 9
CODES = 32


class Words:
  """Every word is an id from 3 on; pickles, as grain's workers need it."""

  size = 200

  def encode(self, text):
    return [3 + sum(word.encode()) % 190 for word in text.split()]


class Source:
  """`documents[task]` are tuples of parts; image i is filled with i."""

  name = "fake"
  image_size = SIZE

  def __init__(self, documents, num_images=20, bad=()):
    self.documents, self.num_images, self.bad = documents, num_images, bad

  def image(self, i):
    if i in self.bad:
      raise image_io.ImageError(f"image {i} is bad")
    return np.full((SIZE, SIZE, 3), i, np.uint8)

  def image_key(self, i):
    return f"image{i}"

  def captions(self, i):
    return [f"caption {i}", f"another {i}"]

  def tasks(self):
    return tuple(self.documents)

  def num_examples(self, task):
    return len(self.documents.get(task, ()))

  def example(self, task, i):
    return examples.Example(f"{task}/{i}", task, self.documents[task][i])


class Cache:
  """Image i keeps its first counts[i] patches and has codes i, i + 1, …"""

  directory = pathlib.Path("fake")

  def __init__(self, counts):
    self.counts = np.array(counts, np.int32)
    self.num_patches = PATCHES
    self.meta = codes_lib.Meta(
      source="fake",
      tokenizer="fake",
      num_images=len(counts),
      num_patches=PATCHES,
      num_codes=CODES,
    )

  def __len__(self):
    return len(self.counts)

  def keep(self, i):
    return np.arange(PATCHES) < self.counts[i]

  def codes(self, i):
    return (i + np.arange(max(self.counts[i], 0))) % CODES
