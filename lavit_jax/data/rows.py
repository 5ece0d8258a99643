"""Rows of packed documents: what a plan's row number becomes as arrays."""

import functools
import hashlib
import pickle
import zlib

import numpy as np

from lavit_jax import images
from lavit_jax.data import faults, packing, sequences

_WINDOWS_KEPT = 4  # windows whose tokenised texts stay in memory


class Documents:
  """Documents of the stream g: their sizes and their sequences.

  `limits` are (positions, pictures) a row; a document beyond them, or one that
  holds nothing to learn, gets size -1 and is named in the log.
  """

  def __init__(
    self,
    components,
    tokenizer,
    vocabulary,
    *,
    limits,
    seed,
    limit_share,
    window,
  ):
    self._parts, self._tokenizer = components, tokenizer
    self._vocabulary, self._limits = vocabulary, limits
    counts = [c.source.num_examples(c.task) for c in components]
    weights = [c.weight for c in components]
    self._stream = packing.Mixture(counts, weights, seed)
    keep = functools.lru_cache(maxsize=_WINDOWS_KEPT * window)
    self._spans = keep(self._find_spans)
    self.image_size = components[0].source.image_size
    patches = [c.cache.num_patches for c in components if c.cache]
    self.num_patches = patches[0] if patches else 1
    self.logs = (
      faults.FaultLog("documents", limit_share),
      faults.FaultLog("pictures", limit_share),
    )

  def sizes(self, start, stop):
    """int32[stop - start, 2]: positions and pictures, -1 if left out."""
    out = np.full((stop - start, 2), -1, np.int32)
    for g in range(start, stop):
      c, i = self._stream.document(g)
      spans = self._spans(c, i)
      if isinstance(spans, str):
        key = self._parts[c].source.example(self._parts[c].task, i).key
        self.logs[0].fault(key, spans)
        continue
      out[g - start] = sequences.size(spans)
      self.logs[0].good()
    return out

  def build(self, g):
    """(component, Sequence) of document g."""
    c, i = self._stream.document(g)
    part = self._parts[c]
    spans = self._spans(c, i)
    return part, sequences.assemble(spans, part.cache, self._vocabulary)

  def picture(self, component, i):
    """(uint8[H, W, 3], valid) of a picture that is read."""
    return picture(component.source, i, self.logs[1])

  def _find_spans(self, c, i):
    """The spans of an example, or why it cannot be used, a str."""
    part, (length, slots) = self._parts[c], self._limits
    example = part.source.example(part.task, i)
    try:
      spans = sequences.spans(example, part.cache, self._tokenizer)
    except sequences.Unusable as error:
      return str(error)
    positions, pictures = sequences.size(spans)
    if positions > length:
      return f"{positions} positions, more than length={length}"
    if pictures > slots:
      return f"{pictures} pictures read, more than slots={slots}"
    return spans


def picture(source, i, log):
  """(uint8[H, W, 3], valid) of a picture; a bad one is black and logged."""
  try:
    pixels = source.image(i)
  except images.ImageError as error:
    log.fault(source.image_key(i), error)
    return np.zeros((source.image_size,) * 2 + (3,), np.uint8), False
  log.good()
  return pixels, True


def memo_path(components, tokenizer, **settings):
  """Where the plan of a mixture is remembered: beside its first code cache.

  The name is a digest of everything that the plan depends on, but for the
  texts themselves; the plan checks what it reads there. None without a cache.
  """
  caches = [c.cache for c in components if c.cache is not None]
  if not caches:
    return None
  digest = hashlib.sha256(pickle.dumps(tokenizer))
  for c in components:
    size = c.source.num_examples(c.task)
    digest.update(repr((c.source.name, c.task, str(c.weight), size)).encode())
    if c.cache is not None:
      digest.update(repr(c.cache.meta).encode() + c.cache.counts.tobytes())
  digest.update(repr(sorted(settings.items())).encode())
  return caches[0].directory / "plans" / f"{digest.hexdigest()[:32]}.npy"


class Rows:
  """Row number to the arrays of a packed row."""

  def __init__(self, plan, documents):
    self._plan, self._documents = plan, documents
    self._length, self._slots = plan.limits

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
