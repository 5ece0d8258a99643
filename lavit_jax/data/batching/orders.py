"""Endless shuffled orders, of which any item is computed by its number."""

import functools

import numpy as np

_SMALL = 1 << 16  # items whose permutation is drawn and kept
_ROUNDS = 6
_FACTORS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)


def make_seed(*numbers: int) -> int:
  """Returns a 32-bit seed from several integers."""
  return int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])


class Permutation:
  """An endless order: all of 0 … count - 1, shuffled anew each epoch.

  Permutation(3, seed)[k] is a pure function of k. Of many items no list is
  made: each number is enciphered among all of them.
  """

  def __init__(self, count: int, seed: int) -> None:
    """Makes the order of `count` items."""
    self._count, self._seed = count, seed
    self._drawn = functools.lru_cache(maxsize=4)(self._draw)
    self._keys = functools.lru_cache(maxsize=4)(self._draw_keys)

  def __getitem__(self, k: int) -> int:
    if self._count < _SMALL:
      epoch, index = divmod(int(k), self._count)
      return int(self._drawn(epoch)[index])
    return int(self.take(np.array([k], np.int64))[0])

  def take(self, numbers: np.ndarray) -> np.ndarray:
    """Returns the items int64[n] at places int64[n] of the order."""
    epochs, places = np.divmod(numbers, self._count)
    out = np.empty(len(numbers), np.int64)
    for epoch in np.unique(epochs).tolist():
      chosen = epochs == epoch
      out[chosen] = self._of_epoch(epoch, places[chosen])
    return out

  def _of_epoch(self, epoch, places):
    if self._count < _SMALL:
      return self._drawn(epoch)[places]
    return _enciphered(places, self._count, self._keys(epoch))

  def _draw(self, epoch):
    rng = np.random.default_rng([self._seed, epoch])
    return rng.permutation(self._count)

  def _draw_keys(self, epoch):
    sequence = np.random.SeedSequence([self._seed, epoch])
    return sequence.generate_state(_ROUNDS, np.uint64)


def _enciphered(numbers, count, keys):
  """Maps numbers int64[n] in 0 … count - 1 one to one to such numbers.

  A Feistel cipher permutes the numbers of an even number of bits; those that
  it takes beyond `count` are enciphered again until they are below it (J. Black
  and P. Rogaway, Ciphers with arbitrary finite domains, 2002).
  """
  half = np.uint64(((count - 1).bit_length() + 1) // 2)
  mask = (np.uint64(1) << half) - np.uint64(1)
  out = numbers.astype(np.uint64)
  todo = np.arange(len(out))
  while len(todo):
    left, right = out[todo] >> half, out[todo] & mask
    for key in keys:
      mixed = (right ^ key) * _FACTORS[0]
      mixed = (mixed ^ (mixed >> _SHIFT)) * _FACTORS[1]
      left, right = right, left ^ (mixed >> _SHIFT & mask)
    out[todo] = (left << half) | right
    todo = todo[out[todo] >= count]
  return out.astype(np.int64)
