"""Rows of packed documents: what a plan's row number becomes as arrays."""

import dataclasses
import functools
import hashlib
import pickle
import zlib

import numpy as np

from lavit_jax.core import image_io
from lavit_jax.data import faults, sequences
from lavit_jax.data.batching import packing, pieces

_RULES = b"long documents are divided"  # of plans, for their memos
_WINDOWS_KEPT = 4  # windows whose tokenised texts stay in memory


@dataclasses.dataclass(frozen=True)
class _Found:
  """What an example has become.

  pieces: tuple of what `sequences.assemble` takes; none if it is left out.
  fault: why it cannot be used; long: what its length has led to; "" for none.
  """

  pieces: tuple = ()
  fault: str = ""
  long: str = ""


class Documents:
  """Documents of the stream g: their sizes and their sequences.

  `limits` are (positions, images) a row; a document beyond them is divided
  (`pieces.divide`). One that cannot be, one that is bad, or that holds nothing
  to learn, gets size -1. `logs` name and count: bad documents, bad images,
  and, apart from these, documents longer than a row.
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
    self._found = keep(self._find)
    self.image_size = components[0].source.image_size
    patches = [c.cache.num_patches for c in components if c.cache]
    self.num_patches = patches[0] if patches else 1
    self.logs = (
      faults.FaultLog("documents", limit_share),
      faults.FaultLog("images", limit_share),
      faults.Tally("documents longer than a row"),
    )

  def sizes(self, start, stop):
    """A list of int[k, 2], positions and images of each of k pieces.

    Those of a document that is left out are -1.
    """
    out, left_out = [], np.full((1, 2), -1, np.int32)
    bad, _, long = self.logs
    for g in range(start, stop):
      c, i = self._stream.document(g)
      found = self._found(c, i)
      if found.fault:
        bad.fault(self._key(c, i), found.fault)
      else:
        bad.good()
      if found.long:
        long.count(self._key(c, i), found.long)
      sizes = [sequences.size(spans) for spans in found.pieces]
      out.append(np.array(sizes, np.int32) if sizes else left_out)
    return out

  def build(self, member):
    """(component, Sequence) of a member of a row: g, or (g, piece)."""
    g, piece = member if isinstance(member, tuple) else (member, 0)
    c, i = self._stream.document(g)
    part, spans = self._parts[c], self._found(c, i).pieces[piece]
    return part, sequences.assemble(spans, part.cache, self._vocabulary)

  def _key(self, c, i):
    return self._parts[c].source.example(self._parts[c].task, i).key

  def image(self, component, i):
    """(uint8[H, W, 3], valid) of an image that is read."""
    return image(component.source, i, self.logs[1])

  def _find(self, c, i):
    """The `_Found` of an example."""
    part = self._parts[c]
    example = part.source.example(part.task, i)
    try:
      spans = sequences.spans(example, part.cache, self._tokenizer)
      made, done = pieces.divide(spans, part.task, self._limits)
    except pieces.TooLong as error:
      return _Found(long=f"{error}: left out")
    except sequences.Unusable as error:
      return _Found(fault=str(error))
    return _Found(tuple(made), long=done or "")


def image(source, i, log):
  """(uint8[H, W, 3], valid) of an image; a bad one is black and logged."""
  try:
    pixels = source.image(i)
  except image_io.ImageError as error:
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
  digest = hashlib.sha256(_RULES)
  digest.update(pickle.dumps(tokenizer))
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
    for segment, member in enumerate(members, start=1):
      component, doc = self._documents.build(member)
      span = slice(start, start + len(doc))
      row["tokens"][span], row["targets"][span] = doc.tokens, doc.targets
      row["weights"][span] = doc.weights
      row["slot"][span] = np.where(doc.slot < 0, -1, doc.slot + slot)
      row["order"][span] = doc.order
      row["segments"][span] = segment
      row["positions"][span] = np.arange(len(doc))
      for i in doc.images:
        pixels, valid = self._documents.image(component, i)
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
