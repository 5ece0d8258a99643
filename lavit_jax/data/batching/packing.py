"""Plans which documents are packed into which row.

Documents g = 0, 1, 2, … form one endless stream (`Mixture`). Each window of it
is packed into rows by first-fit decreasing with two capacities, so a row is a
pure function of (seed, row number), without queues or other state.
"""

import bisect
import dataclasses
import fractions
import functools
import logging
import math
import os
import pathlib
import secrets
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence

import grain.python as grain
import numpy as np

from lavit_jax.core import errors
from lavit_jax.data import examples, sequences

_LOG = logging.getLogger(__name__)
_MAX_PERIOD = 100_000  # documents
_MIN_GRAIN_SHUFFLE = 1 << 16  # items
_MAX_EMPTY = 16  # windows in a row without one usable document
_WINDOWS_KEPT = 8  # windows whose rows stay in memory
_SAVE_EVERY = 4  # windows between two writes of the memo

# A document of a row: its number g, or (g, piece) of one that is divided.
Member = int | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Component:
  """One kind of document in a mixture.

  Attributes:
    source: of the examples.
    task: of the examples.
    weight: share of documents, relative to the other components.
    cache: the source's CodeCache; None for a task without images.
  """

  source: examples.Source
  task: str
  weight: float = 1.0
  cache: sequences.Codes | None = None


class Permutation:
  """An endless order: all of 0 … count - 1, shuffled anew each epoch.

  Permutation(3, seed)[k] is a pure function of k. Grain's shuffle walks a
  cycle of at least 2**16, which takes milliseconds an item for short ranges:
  for these a permutation is drawn for each epoch instead.
  """

  def __init__(self, count: int, seed: int) -> None:
    """Makes the order of `count` items."""
    self._count, self._seed = count, seed
    if count < _MIN_GRAIN_SHUFFLE:
      self._permutation = functools.lru_cache(maxsize=4)(self._permute)
    else:
      self._shuffled = grain.MapDataset.range(count).shuffle(seed).repeat()

  def __getitem__(self, k: int) -> int:
    if self._count >= _MIN_GRAIN_SHUFFLE:
      return int(self._shuffled[k])
    epoch, index = divmod(k, self._count)
    return int(self._permutation(epoch)[index])

  def _permute(self, epoch):
    rng = np.random.default_rng([self._seed, epoch])
    return rng.permutation(self._count)


class Mixture:
  """The document stream: component and example of document g.

  Among the first G documents, component c has G * w_c to within one, for every
  G (Tijdeman's chairman assignment). Each component goes through its examples
  in an order shuffled anew each epoch. Mixture([30, 10], [3, 1], seed) is an
  endless stream with every fourth document from the second component.
  """

  def __init__(
    self, counts: Sequence[int], weights: Sequence[float], seed: int
  ) -> None:
    """Makes the stream.

    Args:
      counts: examples of each component.
      weights: share of each component, relative to the others.
      seed: of the orders.

    Raises:
      errors.ConfigError: negative or only zero weights, a component with a
        weight and no examples, or weights whose pattern is too long.
    """
    shares = _shares(counts, weights)
    period = math.lcm(*(s.denominator for s in shares))
    if period > _MAX_PERIOD:
      raise errors.ConfigError(
        f"Mixture weights {list(weights)} only repeat after {period} documents;"
        " use rounder weights, such as 2, 1 and 0.5."
      )
    self._pattern = _assign(shares, period)  # [P] component of g % P
    ones = self._pattern[:, None] == np.arange(len(shares))
    self._before = np.cumsum(ones, axis=0) - ones  # [P, C], earlier ones
    self._in_period = ones.sum(axis=0)  # [C]
    self._orders = [
      Permutation(max(n, 1), make_seed(seed, c)) for c, n in enumerate(counts)
    ]

  def document(self, g: int) -> tuple[int, int]:
    """Returns (component, example index) of document g."""
    period, position = divmod(int(g), len(self._pattern))
    c = int(self._pattern[position])
    ordinal = period * int(self._in_period[c]) + int(self._before[position, c])
    return c, self._orders[c][ordinal]


def _shares(counts, weights):
  """Returns exact shares that sum to one; raises ConfigError, see Mixture."""
  weights = [fractions.Fraction(str(w)) for w in weights]
  if not weights or any(w < 0 for w in weights) or not sum(weights):
    raise errors.ConfigError(
      "Mixture weights must be positive numbers, at least one; got"
      f" {[float(w) for w in weights]}."
    )
  for c, (n, w) in enumerate(zip(counts, weights, strict=True)):
    if w and n < 1:
      raise errors.ConfigError(
        f"Component {c} of the mixture has weight {float(w)} but no examples."
        " Remove it, or check its data."
      )
  return [w / sum(weights) for w in weights]


def _assign(shares, period):
  """Returns the component of each document of a period, int[period].

  At each position it is the one whose next document is due first. R. Tijdeman,
  The chairman assignment problem (1980): every component stays within
  1 - 1/(2C - 2) of its share at every position.
  """
  size = len(shares)
  if size == 1:
    return np.zeros(period, np.int64)
  slack = 1 - fractions.Fraction(1, 2 * size - 2)
  scale = slack.denominator * period  # everything below is an exact integer
  step = [int(s * scale) for s in shares]
  slack, taken = int(slack * scale), [0] * size
  pattern = np.empty(period, np.int64)
  for position in range(1, period + 1):
    best, best_due = -1, None
    for c in range(size):
      owed = step[c] * position - taken[c] * scale
      if step[c] and owed >= scale - slack:
        due = fractions.Fraction(slack - owed, step[c])
        if best_due is None or due < best_due:
          best, best_due = c, due
    taken[best] += 1
    pattern[position - 1] = best
  return pattern


def make_seed(*numbers: int) -> int:
  """Returns a 32-bit seed from several integers."""
  return int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])


def first_fit(
  sizes: np.ndarray | Sequence[Sequence[int]], max_len: int, max_images: int
) -> list[list[int]]:
  """Packs documents by first-fit decreasing with two capacities.

  Args:
    sizes: int[n, 2], positions and images of each document; a document with
      negative size is left out.
    max_len: L, positions a row.
    max_images: S, images a row.

  Returns:
    The rows, each a list of indices into `sizes`. [[5, 0], [3, 0], [4, 0]]
    in rows of 8 gives [[0, 1], [2]].

  Raises:
    ValueError: a document fits no row.
  """
  sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
  share = np.maximum(sizes[:, 0] / max_len, sizes[:, 1] / max(max_images, 1))
  usable = np.flatnonzero(sizes[:, 0] >= 0)
  order = usable[np.argsort(-share[usable], kind="stable")]
  room = np.empty((len(order), 2), np.int64)
  room[:] = max_len, max_images
  rows: list[list[int]] = []
  full = 0  # the first `full` rows have no room for any document
  least = sizes[usable, 0].min(initial=max_len)
  for i in order:
    fits = (room[full : len(rows) + 1] >= sizes[i]).all(axis=1)
    row = full + int(fits.argmax())
    if not fits[row - full]:
      raise ValueError(
        f"document {i} of size {sizes[i].tolist()} fits no row of"
        f" {[max_len, max_images]}; give it a negative size to leave it out."
      )
    if row == len(rows):
      rows.append([])
    rows[row].append(int(i))
    room[row] -= sizes[i]
    while full < len(rows) and room[full, 0] < least:
      full += 1
  return rows


class PackingPlan:
  """Maps a row number to documents, for documents of known sizes.

  Attributes:
    limits: (positions, images) a row.
    window: number of documents packed together.
  """

  def __init__(
    self,
    sizes: Callable[[int, int], Iterable[np.ndarray]],
    *,
    limits: tuple[int, int],
    window: int = 1024,
    seed: int = 0,
    memo: pathlib.Path | None = None,
  ) -> None:
    """Makes the plan; packs nothing yet.

    Args:
      sizes: pure function of (start, stop) that gives for each of these
        documents int[2], positions and images, or int[k, 2] if it has k
        pieces; negative for one that is left out.
      limits: (positions, images) a row.
      window: documents packed together.
      seed: of the order of the rows in a window.
      memo: file that keeps how many rows each window has, so that a resumed
        run need not pack earlier windows again; None for none. It may be
        deleted at any time, and is checked when it is used.
    """
    self._sizes, self.window, self._shuffle_seed = sizes, window, seed
    self.limits = limits
    self._memo = memo
    # Of each known window: number of rows, and a checksum of its documents.
    self._known = _read_known(memo)
    self._starts = [0, *np.cumsum([n for n, _ in self._known]).tolist()]
    self._saved = len(self._known)
    self._trusted = False  # until the last window in the memo is checked
    self._lock = threading.RLock()
    self._window_rows = functools.lru_cache(maxsize=_WINDOWS_KEPT)(self._pack)

  def row(self, number: int) -> tuple[Member, ...]:
    """Returns the documents of a row.

    Raises:
      errors.DataError: no document of many windows can be used.
    """
    with self._lock:
      if not self._trusted and self._known:
        self._check(len(self._known) - 1)
      self._trusted = True
      self._extend(number)
      window = bisect.bisect_right(self._starts, number) - 1
      if not self._check(window):
        return self.row(number)
      return self._window_rows(window)[0][number - self._starts[window]]

  def _check(self, window):
    """Whether a window is as in the memo; drops the memo if it is not."""
    rows, checksum = self._window_rows(window)
    if (len(rows), checksum) == self._known[window]:
      return True
    _LOG.warning("%s was made from other data and is not used", self._memo)
    self._known, self._starts, self._saved = [], [0], 0
    return False

  def _extend(self, number):
    """Packs more windows until the row is among them."""
    empty = 0
    while self._starts[-1] <= number:
      rows, checksum = self._window_rows(len(self._known))
      self._known.append((len(rows), checksum))
      self._starts.append(self._starts[-1] + len(rows))
      empty = 0 if rows else empty + 1
      if empty >= _MAX_EMPTY:
        raise errors.DataError(
          f"None of {empty * self.window} documents in a row can be used: they"
          f" are longer than {self.limits[0]} positions and cannot be split,"
          f" read more than {self.limits[1]} images, or are bad. See the log"
          " for names; config.data.length and config.data.slots set the limits."
        )
      more = max(
        _SAVE_EVERY, self._saved // 8
      )  # each write is of the whole memo
      if self._memo and len(self._known) >= self._saved + more:
        self._saved = len(self._known)
        _write_known(self._memo, self._known)

  def _pack(self, window):
    """Returns shuffled rows of a window, and a checksum of its sizes."""
    start = window * self.window
    pieces = [
      np.asarray(size, np.int64).reshape(-1, 2)
      for size in self._sizes(start, start + self.window)
    ]
    members = [
      g if len(size) == 1 else (g, k)
      for g, size in enumerate(pieces, start)
      for k in range(len(size))
    ]
    sizes = np.concatenate(pieces)
    rows = first_fit(sizes, *self.limits)
    order = np.random.default_rng([self._shuffle_seed, window])
    shuffled = [
      tuple(members[i] for i in rows[j]) for j in order.permutation(len(rows))
    ]
    return shuffled, zlib.crc32(sizes.tobytes())


def _read_known(memo):
  """Returns the windows in the memo, [] if it holds no valid ones."""
  try:
    known = np.load(memo) if memo else np.zeros((0, 2), np.int64)
  except (OSError, ValueError, EOFError):  # EOFError: nothing is in it
    return []
  good = known.ndim == 2 and known.shape[1] == 2 and (known >= 0).all()
  return [tuple(pair) for pair in known.tolist()] if good else []


def _write_known(memo, known):
  """Writes the memo if its folder can be written."""
  if len(_read_known(memo)) >= len(known):
    return  # another process of the run has written it
  # Processes of several machines may share a process id, and this folder.
  unfinished = memo.with_name(f"{memo.stem}.{secrets.token_hex(8)}.tmp")
  try:
    memo.parent.mkdir(exist_ok=True)
    with unfinished.open("wb") as file:
      np.save(file, np.array(known, np.int64))
    os.replace(unfinished, memo)
  except OSError as error:
    _LOG.info(
      "%s could not be written (%s); resuming will be slower", memo, error
    )
