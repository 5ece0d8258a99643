"""Packing as a plan: which documents stand in which row.

Documents g = 0, 1, 2, … form one endless stream (`Mixture`). Each window of it
is packed into rows by first-fit decreasing with two capacities, so a row is a
pure function of (seed, row number): nothing is queued, nothing has a state.
"""

import bisect
import dataclasses
import fractions
import functools
import logging
import math
import os
import secrets
import threading
import zlib
from typing import Any

import grain.python as grain
import numpy as np

from lavit_jax.core import errors

_LOG = logging.getLogger(__name__)
_MAX_PERIOD = 100_000
_FEW = 1 << 16
_MAX_EMPTY = 16  # windows in a row without one usable document
_WINDOWS_KEPT = 8  # windows whose rows stay in memory
_SAVE_EVERY = 4  # windows between two writes of the memo


@dataclasses.dataclass(frozen=True)
class Component:
  """One kind of document: a task of a source, its share and its codes.

  `weight` counts documents, relative to the other components'; `cache` is the
  source's CodeCache, None for a task without images.
  """

  source: Any
  task: str
  weight: float = 1.0
  cache: Any = None


class Permutation:
  """An endless order: all of 0 … count - 1, anew shuffled each epoch.

  Permutation(3, seed)[k] is a pure function of k. Grain's shuffle walks a
  cycle of 2**16 at least, milliseconds an item where there are few: below that
  a permutation of the epoch is drawn instead.
  """

  def __init__(self, count, seed):
    self._count, self._seed = count, seed
    if count < _FEW:
      self._permutation = functools.lru_cache(maxsize=4)(self._permute)
    else:
      self._shuffled = grain.MapDataset.range(count).shuffle(seed).repeat()

  def __getitem__(self, k):
    if self._count >= _FEW:
      return int(self._shuffled[k])
    epoch, place = divmod(k, self._count)
    return int(self._permutation(epoch)[place])

  def _permute(self, epoch):
    rng = np.random.default_rng([self._seed, epoch])
    return rng.permutation(self._count)


class Mixture:
  """The document stream: component and example of document g.

  Among the first G documents, component c has G * w_c to within one, for every
  G (Tijdeman's chairman assignment). Each component runs through its examples
  in an order shuffled anew each epoch. Mixture([30, 10], [3, 1], seed) is an
  endless stream with every fourth document from the second component.
  """

  def __init__(self, counts, weights, seed):
    shares = _shares(counts, weights)
    period = math.lcm(*(s.denominator for s in shares))
    if period > _MAX_PERIOD:
      raise errors.ConfigError(
        f"Mixture weights {list(weights)} only repeat after {period} documents;"
        " use rounder weights, such as 2, 1 and 0.5."
      )
    self._pattern = _assign(shares, period)  # [P] component of g % P
    ones = self._pattern[:, None] == np.arange(len(shares))
    self._before = np.cumsum(ones, axis=0) - ones  # [P, C] seen before
    self._in_period = ones.sum(axis=0)  # [C]
    self._orders = [
      Permutation(max(n, 1), make_seed(seed, c)) for c, n in enumerate(counts)
    ]

  def document(self, g):
    """(component, example index) of document g, two ints."""
    turn, place = divmod(int(g), len(self._pattern))
    c = int(self._pattern[place])
    ordinal = turn * int(self._in_period[c]) + int(self._before[place, c])
    return c, self._orders[c][ordinal]


def _shares(counts, weights):
  """Exact shares that sum to one; empty components and bad weights raise."""
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
        " Take it out, or check its data."
      )
  return [w / sum(weights) for w in weights]


def _assign(shares, period):
  """int[period]: at each place the component whose next turn is due first.

  R. Tijdeman, The chairman assignment problem (1980): every component stays
  within 1 - 1/(2C - 2) of its share at every place.
  """
  size = len(shares)
  if size == 1:
    return np.zeros(period, np.int64)
  slack = 1 - fractions.Fraction(1, 2 * size - 2)
  scale = slack.denominator * period  # everything below is an exact integer
  step = [int(s * scale) for s in shares]
  slack, had = int(slack * scale), [0] * size
  pattern = np.empty(period, np.int64)
  for place in range(1, period + 1):
    best, due = -1, None
    for c in range(size):
      owed = step[c] * place - had[c] * scale
      if step[c] and owed >= scale - slack:
        when = fractions.Fraction(slack - owed, step[c])
        if due is None or when < due:
          best, due = c, when
    had[best] += 1
    pattern[place - 1] = best
  return pattern


def make_seed(*numbers):
  """A 32-bit seed from several integers."""
  return int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])


def first_fit(sizes, max_len, max_images):
  """Rows by first-fit decreasing with two capacities.

  Args:
    sizes: int[n, 2] positions and images of each document; a document with
      negative size is left out.
    max_len: positions a row, L.
    max_images: images a row, S.

  Returns:
    list of rows, each a list of indices into `sizes`. [[5, 0], [3, 0], [4, 0]]
    in rows of 8 gives [[0, 1], [2]].
  """
  sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
  share = np.maximum(sizes[:, 0] / max_len, sizes[:, 1] / max(max_images, 1))
  usable = np.flatnonzero(sizes[:, 0] >= 0)
  order = usable[np.argsort(-share[usable], kind="stable")]
  room = np.empty((len(order), 2), np.int64)
  room[:] = max_len, max_images
  rows, full = [], 0  # the first `full` rows have no room for anything
  least = sizes[usable, 0].min(initial=max_len)
  for i in order:
    fits = (room[full : len(rows) + 1] >= sizes[i]).all(axis=1)
    row = full + int(fits.argmax())
    if not fits[row - full]:
      raise ValueError(
        f"document {i} of size {sizes[i].tolist()} fits no row of"
        f" {[max_len, max_images]}; leave it out beforehand."
      )
    if row == len(rows):
      rows.append([])
    rows[row].append(int(i))
    room[row] -= sizes[i]
    while full < len(rows) and room[full, 0] < least:
      full += 1
  return rows


class PackingPlan:
  """Row number to documents, for a stream of documents of known sizes.

  Args:
    sizes: function of (start, stop) giving for each of these documents int[2],
      positions and images, or int[k, 2] where it has k pieces; negative for
      one that is left out. Must be pure.
    limits: (positions, images) a row.
    window: documents packed together.
    seed: of the order of the rows in a window.
    memo: file that remembers how many rows each window has, so that a resumed
      run need not pack the windows before it again; None for none. It may be
      deleted at any time, and is checked when it is used.
  """

  def __init__(self, sizes, *, limits, window=1024, seed=0, memo=None):
    self._sizes, self.window, self._shuffle_seed = sizes, window, seed
    self.limits = limits
    self._memo = memo
    # Of each window known so far: its rows, and a check of its documents.
    self._known = _read_known(memo)
    self._starts = [0, *np.cumsum([n for n, _ in self._known]).tolist()]
    self._saved = len(self._known)
    self._trusted = False  # until the last window remembered is packed again
    self._lock = threading.RLock()
    self._window_rows = functools.lru_cache(maxsize=_WINDOWS_KEPT)(self._pack)

  def row(self, number):
    """The documents of a row, a tuple of stream positions g.

    Piece k of a document of several is (g, k).
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
    """Whether a window is as remembered; forgets everything if it is not."""
    rows, check = self._window_rows(window)
    if (len(rows), check) == self._known[window]:
      return True
    _LOG.warning("%s is of other data and is not used", self._memo)
    self._known, self._starts, self._saved = [], [0], 0
    return False

  def _extend(self, number):
    """Packs further windows until the row is among them."""
    empty = 0
    while self._starts[-1] <= number:
      rows, check = self._window_rows(len(self._known))
      self._known.append((len(rows), check))
      self._starts.append(self._starts[-1] + len(rows))
      empty = 0 if rows else empty + 1
      if empty >= _MAX_EMPTY:
        raise errors.DataError(
          f"None of {empty * self.window} documents in a row can be used: they"
          f" are longer than {self.limits[0]} positions and cannot be split,"
          f" read more than {self.limits[1]} images, or are bad. See the log"
          " for names; config.data.length and config.data.slots say what fits."
        )
      more = max(_SAVE_EVERY, self._saved // 8)  # each time it is all written
      if self._memo and len(self._known) >= self._saved + more:
        self._saved = len(self._known)
        _write_known(self._memo, self._known)

  def _pack(self, window):
    """Rows of one window in shuffled order, and a check of its sizes."""
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
  """What the memo remembers, [] where it holds nothing that makes sense."""
  try:
    known = np.load(memo) if memo else np.zeros((0, 2), np.int64)
  except (OSError, ValueError, EOFError):  # EOFError: nothing is in it
    return []
  good = known.ndim == 2 and known.shape[1] == 2 and (known >= 0).all()
  return [tuple(pair) for pair in known.tolist()] if good else []


def _write_known(memo, known):
  """Remembers the windows; a folder that cannot be written is no fault."""
  if len(_read_known(memo)) >= len(known):
    return  # another process of the run has done it
  # Processes of several machines may share a number, and this folder.
  unfinished = memo.with_name(f"{memo.stem}.{secrets.token_hex(8)}.tmp")
  try:
    memo.parent.mkdir(exist_ok=True)
    with unfinished.open("wb") as file:
      np.save(file, np.array(known, np.int64))
    os.replace(unfinished, memo)
  except OSError as error:
    _LOG.info("%s is not written (%s); resuming will be slower", memo, error)
