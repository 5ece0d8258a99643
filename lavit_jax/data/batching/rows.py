"""Turns the row numbers of a packing plan into arrays of packed documents."""

import dataclasses
import fractions
import functools
import hashlib
import pathlib
import pickle
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lavit_jax.core import image_io
from lavit_jax.core import vocabulary as vocabulary_lib
from lavit_jax.data import contents, examples, faults, sequences
from lavit_jax.data.batching import lengths, mixtures, packing, pieces

_RULES = b"orders are enciphered"  # of plans, for their memos
_MEASURED = 100_000  # documents whose mean length is taken for that of all
_MEASURED_ALONE = 500  # of those whose lengths are not known
_WINDOWS_KEPT = 4  # windows whose tokenised texts stay in memory


@dataclasses.dataclass(frozen=True)
class _Document:
  """An example as it is used.

  Attributes:
    divided: its pieces, arguments of `sequences.assemble`; none if left out.
    fault: why it cannot be used, "" if it can.
    long: how its length was handled, "" if it fits a row.
  """

  divided: tuple[pieces.Spans, ...] = ()
  fault: str = ""
  long: str = ""


class Documents:
  """Documents of the stream g: their sizes and their sequences.

  A document beyond the limits of a row is divided (`pieces.divide`). One that
  cannot be divided, is bad, or holds nothing to learn, has size -1.

  Attributes:
    image_size: height and width of images, in pixels.
    num_patches: N, patches of an image; 1 without a cache.
    stream: component and example of each document.
    logs: counters of (bad documents, bad images, documents longer than a row).
  """

  def __init__(
    self,
    components: Sequence[packing.Component],
    tokenizer: vocabulary_lib.TextTokenizer,
    vocabulary: vocabulary_lib.Vocabulary,
    *,
    limits: pieces.Limits,
    seed: int,
    limit_share: float,
    window: int,
    weights: Mapping[int, Sequence[fractions.Fraction]],
    by_tokens: bool = False,
  ) -> None:
    """Reads the lengths of all examples that are stored.

    Of computed ones, which may be endless and slow to make, each length is
    found when its document is planned.

    Args:
      components: of the mixture.
      tokenizer: of their texts.
      vocabulary: of texts and codes.
      limits: (positions, images) a row.
      seed: of mixture and orders.
      limit_share: share of bad documents, or of bad images, that stops the run.
      window: documents that are planned together.
      weights: of each component: {0: …}, and others by the number of the
        document from which on they hold.
      by_tokens: weights are shares of the positions, not of the documents.
    """
    self._components, self._tokenizer = components, tokenizer
    self._vocabulary, self._limits = vocabulary, limits
    counts = [c.source.num_examples(c.task) for c in components]
    self._lengths: list[lengths.Lengths | None] = []
    for c in components:
      found = None
      if contents.is_stored(c.source):
        found = lengths.of(c.source, c.task, tokenizer)
        lengths.require_codes(c.source, c.task, found, c.cache)
      self._lengths.append(found)
    if by_tokens:
      means = [self._mean_positions(c) for c in range(len(components))]
      weights = {
        start: [w / mean for w, mean in zip(some, means, strict=True)]
        for start, some in weights.items()
      }
    first, *changes = sorted(weights.items())
    names = [f"{c.name}/{c.task}" if c.name else "" for c in components]
    self.stream = mixtures.Mixture(counts, first[1], seed, dict(changes), names)
    keep = functools.lru_cache(maxsize=_WINDOWS_KEPT * window)
    self._document = keep(self._tokenize)
    self.image_size = components[0].source.image_size
    patches = [c.cache.num_patches for c in components if c.cache]
    self.num_patches = patches[0] if patches else 1
    self.logs = (
      faults.FaultLog("documents", limit_share),
      faults.FaultLog("images", limit_share),
      faults.Tally("documents longer than a row"),
    )

  def _mean_positions(self, c):
    """Returns the mean positions in rows of a component's documents.

    Those that are left out count as none: they are drawn, too.
    """
    component, found = self._components[c], self._lengths[c]
    count = component.source.num_examples(component.task)
    measured = _MEASURED if found else _MEASURED_ALONE
    some = np.unique(np.linspace(0, count - 1, measured).astype(np.int64))
    if found is None:
      found = lengths.computed(
        component.source, component.task, self._tokenizer, some
      )
      some = np.arange(len(some))
    sizes = found.sizes(
      some, component.cache.counts if component.cache else None
    )
    left_out = (sizes == lengths.BAD).any(axis=1)
    if component.task not in pieces.DIVISIBLE:
      left_out |= (sizes > self._limits).any(axis=1)
    mean = np.where(left_out, 0, sizes[:, 0]).mean() if len(sizes) else 0.0
    return fractions.Fraction(float(mean) or 1.0)

  def digest(self) -> int:
    """Returns a checksum of all lengths that are known."""
    crc = 0
    for found in self._lengths:
      if found is not None:
        for column in (found.text, found.reads):
          crc = zlib.crc32(np.ascontiguousarray(column).data, crc)
    return crc

  def sizes(self, start: int, stop: int) -> np.ndarray | list[np.ndarray]:
    """Returns sizes of documents start … stop - 1, and logs bad ones.

    Returns:
      int64[n, 2], positions and images of each document; or, if some are
      divided, for each of the n documents int64[k, 2], those of its k pieces.
      A document that is left out has -1 in both.
    """
    components, chosen = self.stream.documents(start, stop)
    sizes = np.empty((stop - start, 2), np.int64)
    for c, component in enumerate(self._components):
      mine, found = components == c, self._lengths[c]
      counts = component.cache.counts if component.cache else None
      if found is None:
        sizes[mine] = lengths.BAD  # not known before it is tokenized
      else:
        sizes[mine] = found.sizes(chosen[mine], counts)
    unusual = (sizes == lengths.BAD).any(1) | (sizes > self._limits).any(1)
    self.logs[0].good(int((~unusual).sum()))
    if not unusual.any():
      return sizes
    pieces_of = list(sizes[:, None])
    for j in np.flatnonzero(unusual).tolist():
      pieces_of[j] = self._unusual(int(components[j]), int(chosen[j]))
    return pieces_of

  def _unusual(self, c, i):
    """Returns sizes int64[k, 2] of the pieces of a document; logs it."""
    document, (bad, _, long) = self._document(c, i), self.logs
    if document.fault:
      bad.fault(self._key(c, i), document.fault)
    else:
      bad.good()
    if document.long:
      long.count(self._key(c, i), document.long)
    found = [sequences.size(spans) for spans in document.divided]
    return np.array(found or [(lengths.BAD,) * 2], np.int64)

  def build(
    self, members: Sequence[packing.Member]
  ) -> Iterator[tuple[packing.Component, sequences.Sequence]]:
    """Yields component and sequence of each member of a row."""
    pairs = [m if isinstance(m, tuple) else (m, 0) for m in members]
    numbers = np.array([g for g, _ in pairs], np.int64)
    components, chosen = (x.tolist() for x in self.stream.at(numbers))
    for c, i, (_, piece) in zip(components, chosen, pairs, strict=True):
      component, spans = (
        self._components[c],
        self._document(c, i).divided[piece],
      )
      cache = component.cache
      yield component, sequences.assemble(spans, cache, self._vocabulary)

  def _key(self, c, i):
    component = self._components[c]
    return component.source.example(component.task, i).key

  def image(
    self, component: packing.Component, i: int
  ) -> tuple[np.ndarray, bool]:
    """Returns (uint8[H, W, 3], valid) of an image that is read."""
    return image(component.source, i, self.logs[1])

  def _tokenize(self, c, i):
    """Returns the _Document of example i of component c."""
    component = self._components[c]
    example = component.source.example(component.task, i)
    try:
      spans = sequences.spans(example, component.cache, self._tokenizer)
      divided, note = pieces.divide(spans, component.task, self._limits)
    except pieces.TooLong as error:
      return _Document(long=f"{error}: left out")
    except sequences.Unusable as error:
      return _Document(fault=str(error))
    return _Document(tuple(divided), long=note or "")


def image(
  source: examples.Source, i: int, log: faults.FaultLog
) -> tuple[np.ndarray, bool]:
  """Returns (uint8[H, W, 3], valid) of image i; logs a bad one, black here."""
  try:
    pixels = source.image(i)
  except image_io.ImageError as error:
    log.fault(source.image_key(i), error)
    return np.zeros((source.image_size,) * 2 + (3,), np.uint8), False
  log.good()
  return pixels, True


def memo_path(
  components: Sequence[packing.Component],
  tokenizer: vocabulary_lib.TextTokenizer,
  **settings: Any,
) -> pathlib.Path | None:
  """Returns where the plan of a mixture is kept: beside its first code cache.

  The name is a digest of everything that the plan depends on, except for the
  texts; the plan checks what it reads there.

  Args:
    components: of the mixture.
    tokenizer: of the texts.
    **settings: other arguments of the plan.

  Returns:
    The path of the file; None without a cache.
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
  """Maps a row number to the arrays of a packed row."""

  def __init__(self, plan: packing.PackingPlan, documents: Documents) -> None:
    """Reads nothing yet."""
    self._plan, self._documents = plan, documents
    self._length, self._slots = plan.limits
    self._positions = np.arange(self._length, dtype=np.int32)

  def __call__(self, number: int) -> dict[str, Any]:
    """Returns the arrays of a row, see `pipeline.packed_mixture`."""
    row = self._blank(number)
    start = images = 0
    members = self._plan.row(int(number))
    documents = self._documents.build(members)
    for segment, (component, doc) in enumerate(documents, start=1):
      span = slice(start, start + len(doc))
      row["tokens"][span], row["targets"][span] = doc.tokens, doc.targets
      row["weights"][span] = doc.weights
      row["segments"][span] = segment
      row["positions"][span] = self._positions[: len(doc)]
      if doc.images:  # -1 and 0 stand where no image is read
        row["image_index"][span] = np.where(
          doc.image_index < 0, -1, doc.image_index + images
        )
        row["token_index"][span] = doc.token_index
      for i in doc.images:
        assert component.cache is not None
        pixels, valid = self._documents.image(component, i)
        row["pixels"][images] = pixels
        row["keep"][images] = component.cache.keep(i)
        if not valid:
          row["weights"][span] = 0
        images += 1
      start = span.stop
    row["doc_hash"] = np.int64(
      zlib.crc32(row["tokens"].tobytes(), zlib.crc32(repr(members).encode()))
    )
    return row

  def _blank(self, number):
    size, docs = self._documents.image_size, self._documents
    names = ("tokens", "targets", "segments", "positions", "token_index")
    row = {name: np.zeros(self._length, np.int32) for name in names}
    return row | {
      "image_index": np.full(self._length, -1, np.int32),
      "weights": np.zeros(self._length, np.float32),
      "pixels": np.zeros((self._slots, size, size, 3), np.uint8),
      "keep": np.zeros((self._slots, docs.num_patches), bool),
      "row": np.int64(number),
    }
