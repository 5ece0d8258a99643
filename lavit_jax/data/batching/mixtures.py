"""The endless stream of documents: which component and example each one is."""

import bisect
import fractions
import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from lavit_jax.core import errors
from lavit_jax.data.batching import orders

_MAX_PERIOD = 1 << 16  # documents after which the pattern of weights repeats


class Mixture:
  """The document stream: component and example of document g.

  Among the first G documents, component c has G * w_c to within one, for every
  G (Tijdeman's chairman assignment). Each component goes through its examples
  in an order shuffled anew each epoch. Mixture([30, 10], [3, 1], seed) is an
  endless stream with every fourth document from the second component.

  Weights whose pattern is longer than 65,536 documents are rounded to shares of
  that many.
  """

  def __init__(
    self,
    counts: Sequence[int],
    weights: Sequence[float | fractions.Fraction],
    seed: int,
    changes: Mapping[int, Sequence[float | fractions.Fraction]] | None = None,
    names: Sequence[str] | None = None,
  ) -> None:
    """Makes the stream.

    Args:
      counts: examples of each component.
      weights: share of each component, relative to the others.
      seed: of the orders.
      changes: other weights, by the number of the first document that has
        them. Earlier documents stay, and each component goes on in its order.
      names: of the components, which decide their orders, so that one with a
        weight of 0 may be added; "": its number decides.

    Raises:
      errors.ConfigError: negative or only zero weights, a component with a
        weight and no examples, or a change before the first document.
    """
    self._counts = np.array([max(n, 1) for n in counts], np.int64)
    self._orders = []
    for c, n in enumerate(self._counts.tolist()):
      name = names[c] if names else ""
      own = zlib.crc32(name.encode()) if name else c
      self._orders.append(orders.Permutation(n, orders.make_seed(seed, own)))
    self._eras = [_Era(0, _shares(counts, weights), 0)]
    for start, changed in sorted((changes or {}).items()):
      last = self._eras[-1]
      if start <= last.start:
        raise errors.ConfigError(
          f"Weights change at document {start}: expected 1 or more."
        )
      self._eras.append(
        _Era(start, _shares(counts, changed), last.before(start))
      )

  def document(self, g: int) -> tuple[int, int]:
    """Returns (component, example index) of document g."""
    components, found = self.at(np.array([g], np.int64))
    return int(components[0]), int(found[0])

  def documents(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (components int64[n], example indices int64[n]) of some.

    Args:
      start: number of the first document.
      stop: number after the last one.
    """
    return self.at(np.arange(start, stop))

  def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (components int64[n], example indices int64[n]) of documents.

    Args:
      numbers: int64[n], of the documents.
    """
    if len(self._eras) == 1:
      component, ordinal = self._eras[0].at(numbers)
    else:
      starts = [era.start for era in self._eras]
      era_of = np.searchsorted(starts, numbers, side="right") - 1
      component = np.empty(len(numbers), np.int64)
      ordinal = np.empty(len(numbers), np.int64)
      for era in np.unique(era_of).tolist():
        mine = era_of == era
        component[mine], ordinal[mine] = self._eras[era].at(numbers[mine])
    found = np.empty_like(ordinal)
    for c in np.unique(component).tolist():
      chosen = component == c
      found[chosen] = self._orders[c].take(ordinal[chosen])
    return component, found

  def epochs(self, g: int) -> np.ndarray:
    """Returns how often each component was gone through before document g.

    Returns:
      float64[C].
    """
    starts = [era.start for era in self._eras]
    era = self._eras[bisect.bisect_right(starts, g) - 1]
    return era.before(g) / self._counts


class _Era:
  """Documents with the same weights.

  Attributes:
    start: number of the first one.
  """

  def __init__(self, start, shares, before):
    """Makes the pattern; `before` is what each component had before."""
    self.start, self._earlier = start, np.asarray(before)
    period = math.lcm(*(s.denominator for s in shares))
    if period > _MAX_PERIOD:
      shares, period = _rounded(shares, _MAX_PERIOD), _MAX_PERIOD
    self._pattern = _assign(shares, period)  # [P] component of g % P
    ones = self._pattern[:, None] == np.arange(len(shares))
    # [P + 1, C], earlier ones; the last row is those of the whole pattern.
    self._before = np.zeros((period + 1, len(shares)), np.int64)
    np.cumsum(ones, axis=0, out=self._before[1:])

  def at(self, numbers):
    """Returns (components, how many of each component came before)."""
    periods, places = np.divmod(numbers - self.start, len(self._pattern))
    component = self._pattern[places]
    ordinal = periods * self._before[-1][component]
    ordinal += self._before[places, component]
    if self._earlier.ndim:
      ordinal += self._earlier[component]
    return component, ordinal

  def before(self, g):
    """Returns how many documents of each component came before g, int64[C]."""
    period, place = divmod(int(g) - self.start, len(self._pattern))
    return self._earlier + period * self._before[-1] + self._before[place]


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


def _rounded(shares, parts):
  """Returns shares of `parts` parts each, the nearest that sum to one.

  What has a share keeps at least one part.
  """
  exact = [share * parts for share in shares]
  taken = [max(int(e), int(e > 0)) for e in exact]
  order = sorted(
    range(len(shares)), key=lambda c: taken[c] - exact[c]
  )  # the one that lacks most comes first
  missing = parts - sum(taken)
  for step in range(abs(missing)):
    # Too many were given to tiny shares: the largest give them back.
    c = order[step % len(order)] if missing > 0 else exact.index(max(exact))
    taken[c] += 1 if missing > 0 else -1
  return [fractions.Fraction(n, parts) for n in taken]


def _assign(shares, period):
  """Returns the component of each document of a period, int64[period].

  At each position it is the one whose next document is due first. R. Tijdeman,
  The chairman assignment problem (1980): every component stays within
  1 - 1/(2C - 2) of its share at every position.
  """
  size = sum(share > 0 for share in shares)  # one without a share adds nothing
  if size == 1:
    return np.full(period, shares.index(1), np.int64)
  slack = 1 - fractions.Fraction(1, 2 * size - 2)
  scale = slack.denominator * period  # everything below is an exact integer
  step = [int(s * scale) for s in shares]
  slack, taken = int(slack * scale), [0] * len(shares)
  pattern = np.empty(period, np.int64)
  for position in range(1, period + 1):
    best, numerator, denominator = -1, 0, 1  # of when the best one is due
    for c in range(len(shares)):
      owed = step[c] * position - taken[c] * scale
      if step[c] and owed >= scale - slack:
        due = slack - owed
        if best < 0 or due * denominator < numerator * step[c]:
          best, numerator, denominator = c, due, step[c]
    taken[best] += 1
    pattern[position - 1] = best
  return pattern
