"""Rows of packed documents: what a plan's row number becomes as arrays."""

import functools
import hashlib
import pickle
import zlib

import grain.python as grain
import numpy as np

from lavit_jax import images
from lavit_jax.data import faults, packing, sequences

_WINDOWS_KEPT = 4  # windows whose tokenised texts stay in memory


class Documents:
  """Documents of the stream g: their sizes and their sequences."""

  def __init__(
    self, components, tokenizer, vocabulary, length, slots, seed, limit_share
  ):
    self._parts, self._tokenizer = components, tokenizer
    self._vocabulary, self._limits = vocabulary, (length, slots)
    counts = [c.source.num_examples(c.task) for c in components]
    self._stream = packing.Mixture(counts, [c.weight for c in components], seed)
    self._known = [np.zeros((n, 2), np.int32) for n in counts]  # 0: not yet
    self._reasons = {}
    self.image_size = components[0].source.image_size
    patches = [c.cache.num_patches for c in components if c.cache]
    self.num_patches = patches[0] if patches else 1
    self.logs = (
      faults.FaultLog("documents", limit_share),
      faults.FaultLog("pictures", limit_share),
    )

  def sizes(self, start, stop):
    """int32[stop - start, 2]: positions and pictures, -1 if left out."""
    out = np.empty((stop - start, 2), np.int32)
    for g in range(start, stop):
      c, i = self._stream.document(g)
      if not self._known[c][i].any():
        self._known[c][i] = self._size(c, i)
      out[g - start] = self._known[c][i]
      if out[g - start, 0] < 0:
        self.logs[0].fault(*self._reasons[c, i])
      else:
        self.logs[0].good()
    return out

  def _size(self, c, i):
    """Size of one document, (-1, -1) with a reason if it cannot be used."""
    example = self._example(c, i)
    length, slots = self._limits
    try:
      size = sequences.size(example, self._parts[c].cache, self._tokenizer)
      if size[0] > length:
        reason = f"{size[0]} positions, more than length={length}"
      elif size[1] > slots:
        reason = f"{size[1]} pictures read, more than slots={slots}"
      else:
        return size
    except sequences.Unusable as error:
      reason = str(error)
    self._reasons[c, i] = (
      f"{self._parts[c].source.name}:{example.key}",
      reason,
    )
    return -1, -1

  def _example(self, c, i):
    return self._parts[c].source.example(self._parts[c].task, i)

  def build(self, g):
    """(component, Sequence) of document g."""
    c, i = self._stream.document(g)
    sequence = sequences.build(
      self._example(c, i),
      self._parts[c].cache,
      self._tokenizer,
      self._vocabulary,
    )
    return self._parts[c], sequence

  def picture(self, component, i):
    """(pixels, valid) of a picture that is read."""
    return _picture(component.source, i, self.logs[1])


class Rows:
  """Row number to the arrays of a packed row."""

  def __init__(self, plan, documents, length, slots):
    self._plan, self._documents = plan, documents
    self._length, self._slots = length, slots

  def __call__(self, number):
    row = self._blank(number)
    start = slot = 0
    members = self._plan.row(int(number))
    for segment, g in enumerate(members, start=1):
      component, doc = self._documents.build(g)
      span = slice(start, start + len(doc))
      row["tokens"][span], row["targets"][span] = doc.tokens, doc.targets
      row["weights"][span] = doc.weights
      row["slot"][span] = np.where(doc.slot < 0, -1, doc.slot + slot)
      row["order"][span] = doc.order
      row["segments"][span] = segment
      row["positions"][span] = np.arange(len(doc))
      for i in doc.pictures:
        pixels, valid = self._documents.picture(component, i)
        row["pixels"][slot] = pixels
        row["keep"][slot] = component.cache.keep(i)
        if not valid:
          row["weights"][span] = 0
        slot += 1
      start = span.stop
    row["doc_hash"] = np.int64(
      zlib.crc32(row["tokens"].tobytes(), zlib.crc32(repr(members).encode()))
    )
    return row

  def _blank(self, number):
    size, docs = self._documents.image_size, self._documents
    names = ("tokens", "targets", "segments", "positions", "order")
    row = {name: np.zeros(self._length, np.int32) for name in names}
    return row | {
      "slot": np.full(self._length, -1, np.int32),
      "weights": np.zeros(self._length, np.float32),
      "pixels": np.zeros((self._slots, size, size, 3), np.uint8),
      "keep": np.zeros((self._slots, docs.num_patches), bool),
      "row": np.int64(number),
    }
