"""Packing as a plan: which documents stand in which row.

Documents g = 0, 1, 2, … form one endless stream (`Mixture`). Each window of it
is packed into rows by first-fit decreasing with two capacities, so a row is a
pure function of (seed, row number): nothing is queued, nothing has a state.
"""

import bisect
import dataclasses
import fractions
import functools
import math
import threading
from typing import Any

import grain.python as grain
import numpy as np

from lavit_jax import errors

_MAX_PERIOD = 100_000
_MAX_EMPTY = 16  # windows in a row without one usable document


@dataclasses.dataclass(frozen=True)
class Component:
  """One kind of document: a task of a source, its share and its codes.

  `weight` counts documents, relative to the other components'; `cache` is the
  source's CodeCache, None for a task without pictures.
  """

  source: Any
  task: str
  weight: float = 1.0
  cache: Any = None


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
      grain.MapDataset.range(max(n, 1)).shuffle(make_seed(seed, c)).repeat()
      for c, n in enumerate(counts)
    ]

  def document(self, g):
    """(component, example index) of document g, two ints."""
    turn, place = divmod(int(g), len(self._pattern))
    c = int(self._pattern[place])
    ordinal = turn * int(self._in_period[c]) + int(self._before[place, c])
    return c, int(self._orders[c][ordinal])


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


def first_fit(sizes, max_len, max_pictures):
  """Rows by first-fit decreasing with two capacities.

  Args:
    sizes: int[n, 2] positions and pictures of each document; a document with
      negative size is left out.
    max_len: positions a row, L.
    max_pictures: pictures a row, S.

  Returns:
    list of rows, each a list of indices into `sizes`. [[5, 0], [3, 0], [4, 0]]
    in rows of 8 gives [[0, 1], [2]].
  """
  sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
  share = np.maximum(sizes[:, 0] / max_len, sizes[:, 1] / max(max_pictures, 1))
  usable = np.flatnonzero(sizes[:, 0] >= 0)
  order = usable[np.argsort(-share[usable], kind="stable")]
  room = np.empty((len(order), 2), np.int64)
  room[:] = max_len, max_pictures
  rows = []
  for i in order:
    fits = (room[: len(rows) + 1] >= sizes[i]).all(axis=1)
    row = int(fits.argmax())
    if not fits[row]:
      raise ValueError(
        f"document {i} of size {sizes[i].tolist()} fits no row of"
        f" {[max_len, max_pictures]}; leave it out beforehand."
      )
    if row == len(rows):
      rows.append([])
    rows[row].append(int(i))
    room[row] -= sizes[i]
  return rows


class Plan:
  """Row number to documents, for a stream of documents of known sizes.

  Args:
    sizes: function of (start, stop) giving int[stop - start, 2], positions and
      pictures of each document; negative for one that is left out. Must be
      pure.
    max_len: positions a row.
    max_pictures: pictures a row.
    window: documents packed together.
    seed: of the order of the rows in a window.
  """

  def __init__(self, sizes, *, max_len, max_pictures, window=1024, seed=0):
    self._sizes, self.window, self._shuffle_seed = sizes, window, seed
    self.max_len, self.max_pictures = max_len, max_pictures
    self._starts = [0]  # first row of each window known so far
    self._lock = threading.RLock()
    self._window_rows = functools.lru_cache(maxsize=8)(self._pack)

  def row(self, number):
    """The documents of a row, a tuple of stream positions g."""
    with self._lock:
      empty = 0
      while self._starts[-1] <= number:
        added = len(self._window_rows(len(self._starts) - 1))
        self._starts.append(self._starts[-1] + added)
        empty = 0 if added else empty + 1
        if empty >= _MAX_EMPTY:
          raise errors.DataError(
            f"None of {empty * self.window} documents in a row can be used:"
            f" they are longer than max_len={self.max_len}, have more than"
            f" {self.max_pictures} pictures, or are bad. See the log for names."
          )
      window = bisect.bisect_right(self._starts, number) - 1
      return self._window_rows(window)[number - self._starts[window]]

  def _pack(self, window):
    """Rows of one window in shuffled order."""
    start = window * self.window
    sizes = self._sizes(start, start + self.window)
    rows = first_fit(sizes, self.max_len, self.max_pictures)
    rng = np.random.default_rng([self._shuffle_seed, window])
    return [
      tuple(start + i for i in rows[j]) for j in rng.permutation(len(rows))
    ]
