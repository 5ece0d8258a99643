"""Puts each image into the bucket whose shape is nearest to its own.

A bucket is a height and a width that images are scaled and cropped to. All
images of a batch are of one bucket (Podell et al., arXiv 2307.01952, section
2.3). Batch k is a pure function of the arguments and k:

  assigned = assign(image_sizes.of(source), buckets)
  plan = BucketPlan(assigned, len(buckets), batch_size, seed)
  plan.batch(k) -> (bucket, image numbers)
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from lavit_jax.core import errors
from lavit_jax.data.batching import orders

NONE = -1  # the bucket of an image that cannot be read
_TURNS_KEPT = 256  # batches whose position in their bucket stays in memory


def assign(
  sizes: np.ndarray | Sequence[Sequence[int]],
  buckets: Iterable[Sequence[int]],
) -> np.ndarray:
  """Returns the bucket whose aspect ratio is nearest to each image's.

  Args:
    sizes: int[n, 2], heights and widths.
    buckets: (height, width) of each bucket.

  Returns:
    int8[n]; NONE where a size is (0, 0). The nearest bucket has the least
    difference of log ratios, the earlier one of a tie: [[30, 40], [0, 0]] in
    ((8, 8), (6, 8)) gives [1, -1].

  Raises:
    errors.ConfigError: no bucket, or one without pixels.
  """
  wanted = np.asarray(list(buckets), np.float64).reshape(-1, 2)
  if not len(wanted) or wanted.min() < 1:
    raise errors.ConfigError(
      f"data.buckets={buckets!r}: expected pairs of a height and a width, at"
      " least one."
    )
  sizes = np.asarray(sizes, np.float64).reshape(-1, 2)
  good = (sizes > 0).all(axis=1)
  ratios = np.log(np.where(good[:, None], sizes, 1))
  ratios = ratios[:, 0] - ratios[:, 1]
  wanted = np.log(wanted[:, 0]) - np.log(wanted[:, 1])
  nearest = np.abs(ratios[:, None] - wanted).argmin(axis=1)
  return np.where(good, nearest, NONE).astype(np.int8)


@dataclasses.dataclass(frozen=True)
class View:
  """The part of an image that fills a bucket.

  Attributes:
    box: left, top, right and bottom of the part, in the image's pixels.
    sizes: SDXL's size conditioning (section 2.2): height and width of the
      image, top and left of the crop in the scaled image, height and width of
      the bucket.
  """

  box: tuple[float, float, float, float]
  sizes: tuple[int, int, int, int, int, int]


def view(
  size: Sequence[int],
  bucket: Sequence[int],
  anchor: Sequence[float] = (0.5, 0.5),
) -> View:
  """Returns the largest part of an image with the bucket's aspect ratio.

  Args:
    size: height and width of the image.
    bucket: height and width of the bucket.
    anchor: position of the part, from 0 (top, left) to 1 (bottom, right).

  Returns:
    A View; view((80, 200), (40, 40)) has the box (60, 0, 140, 80) and the
    sizes (80, 200, 0, 30, 40, 40).
  """
  (height, width), (rows, columns) = size, bucket
  scale = max(rows / height, columns / width)  # covers the bucket
  part = min(rows / scale, height), min(columns / scale, width)
  top = (height - part[0]) * anchor[0]
  left = (width - part[1]) * anchor[1]
  box = left, top, left + part[1], top + part[0]
  crop = round(top * scale), round(left * scale)
  return View(box, (height, width, crop[0], crop[1], rows, columns))


class BucketPlan:
  """Maps a batch number to a bucket and its images, without end.

  Each bucket is shown in an order of its own, shuffled anew each epoch. Of
  every N batches, with N images in all, a bucket of n images has exactly n,
  spread evenly, so that all images are shown equally often. A bucket with
  fewer images than a batch comes more seldom, and then shows each image
  several times: a single one is shown B times, once in B epochs.

  Batch k has the bucket of image (k A + c) mod N, of all images in the order
  of their buckets, where A is coprime to N and near its golden section (a Weyl
  sequence in exact integers).
  """

  def __init__(
    self, assigned: np.ndarray, count: int, batch_size: int, seed: int
  ) -> None:
    """Makes the plan.

    Args:
      assigned: int[n], the bucket of each image, see `assign`.
      count: number of buckets.
      batch_size: B, images a batch.
      seed: of all orders.

    Raises:
      errors.DataError: no image has a bucket.
    """
    self._members = members(assigned, count)
    self._size = batch_size
    self._orders = [
      orders.Permutation(max(len(m), 1), orders.make_seed(seed, b))
      for b, m in enumerate(self._members)
    ]
    self._ends = np.cumsum([len(m) for m in self._members]).tolist()
    total = self._ends[-1]
    self._stride = _golden(total)
    self._first = orders.make_seed(seed) % total
    self._turn = functools.lru_cache(maxsize=_TURNS_KEPT)(self._find_turn)

  def bucket(self, k: int) -> int:
    """Returns the bucket of batch k."""
    position = (int(k) * self._stride + self._first) % self._ends[-1]
    return bisect.bisect_right(self._ends, position)

  def _find_turn(self, k):
    """Returns (bucket of batch k, number of earlier batches of that bucket)."""
    b, total = self.bucket(k), self._ends[-1]
    begin = self._ends[b - 1] if b else 0
    # x mod N lies in [s, e) where floor((x - s) / N) - floor((x - e) / N) is 1.
    from_begin, from_end = (
      _floor_sum(k, total, self._stride, self._first - edge)
      for edge in (begin, self._ends[b])
    )
    return b, from_begin - from_end

  def image(self, k: int, j: int) -> int:
    """Returns image j of batch k."""
    b, ordinal = self._turn(int(k))
    return int(self._members[b][self._orders[b][ordinal * self._size + j]])

  def batch(self, k: int) -> tuple[int, np.ndarray]:
    """Returns the bucket and the images int64[B] of batch k."""
    return self.bucket(k), np.array(
      [self.image(k, j) for j in range(self._size)], np.int64
    )


class OnePass:
  """A plan that shows each image once; the last batch of a bucket has gaps.

  It has the methods of `BucketPlan`, and a length; a gap is NONE.
  """

  def __init__(self, assigned: np.ndarray, count: int, batch_size: int) -> None:
    """Makes the plan; arguments and errors are those of `BucketPlan`."""
    self._members, self._size = members(assigned, count), batch_size
    turns = [
      (start, b)
      for b, m in enumerate(self._members)
      for start in range(0, len(m), batch_size)
    ]
    self._turns = sorted(turns)  # alternates: the first few batches show all

  def __len__(self) -> int:
    """Returns the number of batches."""
    return len(self._turns)

  def bucket(self, k: int) -> int:
    """Returns the bucket of batch k."""
    return self._turns[k][1]

  def image(self, k: int, j: int) -> int:
    """Returns image j of batch k, NONE for a gap."""
    start, b = self._turns[k]
    index, chosen = start + j, self._members[b]
    return int(chosen[index]) if index < len(chosen) else NONE


def members(assigned: np.ndarray, count: int) -> list[np.ndarray]:
  """Returns the images int64[n_b] of each of `count` buckets.

  Raises:
    errors.DataError: all buckets are empty.
  """
  chosen = [np.flatnonzero(np.asarray(assigned) == b) for b in range(count)]
  if not any(len(m) for m in chosen):
    raise errors.DataError(
      f"None of {len(assigned)} images can be read: check the paths of the"
      " data."
    )
  return chosen


def rare(assigned: np.ndarray, count: int, batch_size: int) -> dict[int, int]:
  """Returns the number of images of each bucket with fewer than a batch.

  Empty buckets are left out.
  """
  sizes = [len(chosen) for chosen in members(assigned, count)]
  return {b: n for b, n in enumerate(sizes) if 0 < n < batch_size}


def _golden(total) -> int:
  """Returns the integer coprime to `total` nearest to its golden section."""
  start = round(total * (math.sqrt(5) - 1) / 2)
  near = (start + sign * step for step in range(total) for sign in (1, -1))
  return next(a for a in near if a > 0 and math.gcd(a, total) == 1)


def _floor_sum(count, divisor, slope, start) -> int:
  """Sums floor((slope i + start) / divisor) over i = 0 ... count - 1, exactly.

  Uses Euclid's algorithm, in O(log divisor) steps (Graham, Knuth, Patashnik,
  Concrete Mathematics, section 3.5): integer parts are summed in closed form;
  the rest is the same sum with slope and divisor exchanged.
  """
  total = 0
  while count > 0:
    quotient, slope = divmod(slope, divisor)
    total += quotient * count * (count - 1) // 2
    quotient, start = divmod(start, divisor)
    total += quotient * count
    count, start = divmod(slope * count + start, divisor)
    slope, divisor = divisor, slope
  return total
