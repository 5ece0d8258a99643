"""Hashes of images: of their bytes, and of what they look like."""

import hashlib

import numpy as np
from PIL import Image

_SIDE = 8  # differences a line, and lines
_BITS = np.uint64(1) << np.arange(64, dtype=np.uint64)
_SHARED = 4  # parts of a hash, of which near ones share at least one


def of_bytes(data: bytes) -> int:
  """Returns the first 64 bits of the SHA-256 of some bytes."""
  return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def perceptual(image: Image.Image) -> tuple[int, int]:
  """Returns two hashes of 64 bits that alike images share.

  Bit k says whether the grey image, reduced to 9 x 8 pixels, gets brighter to
  the right at place k; in the second hash, of 8 x 9, downwards. (The "dHash"
  of N. Krawetz, 2013, in two directions.)

  Args:
    image: of any size and mode.
  """
  grey = image.convert("L")
  return tuple(
    int(_BITS[np.diff(_reduced(grey, size), axis=axis).ravel() > 0].sum())
    for size, axis in (((_SIDE + 1, _SIDE), 1), ((_SIDE, _SIDE + 1), 0))
  )  # type: ignore[return-value]


def _reduced(grey, size):
  small = grey.resize(size, Image.Resampling.BOX, reducing_gap=3.0)
  return np.asarray(small, np.int16)


def first_near(hashes: np.ndarray, distance: int) -> np.ndarray:
  """Returns for each image the first one that is alike, or itself.

  Two are alike if at most `distance` bits of each of their hashes differ, and
  what is alike to something alike is alike, too: the first of all is returned.

  Args:
    hashes: uint64[n, 2], see `perceptual`.
    distance: 0 to 3; at more, alike hashes may share no part.

  Returns:
    int64[n].

  Raises:
    ValueError: the distance is another.
  """
  if not 0 <= distance < _SHARED:
    raise ValueError(f"distance={distance}: expected 0 to {_SHARED - 1}")
  unique, first, place = np.unique(
    hashes, axis=0, return_index=True, return_inverse=True
  )
  leader = np.arange(len(unique))
  if distance:
    _join(unique, leader, distance)
  # Of each group the image that comes first.
  earliest = np.full(len(unique), len(hashes), np.int64)
  np.minimum.at(earliest, leader, first)
  return earliest[leader[place.ravel()]]


def _join(unique, leader, distance) -> None:
  """Gives hashes that are near each other the same leader."""
  bits = 64 // _SHARED
  mask = np.uint64((1 << bits) - 1)
  for part in range(_SHARED):
    keys = (unique[:, 0] >> np.uint64(part * bits)) & mask
    order = np.argsort(keys, kind="stable")
    bounds = np.flatnonzero(np.diff(keys[order])) + 1
    for some in np.split(order, bounds):
      for place, one in enumerate(some[:-1].tolist()):
        others = some[place + 1 :]
        differ = np.bitwise_count(unique[others] ^ unique[one])
        for other in others[(differ <= distance).all(axis=1)].tolist():
          low, high = sorted((_top(leader, one), _top(leader, other)))
          leader[high] = low
  for k in range(len(leader)):
    leader[k] = _top(leader, k)


def _top(leader, k) -> int:
  """Returns the leader of a group; shortens the way to it."""
  top = k
  while leader[top] != top:
    top = int(leader[top])
  while k != top:
    leader[k], k = top, int(leader[k])
  return top
