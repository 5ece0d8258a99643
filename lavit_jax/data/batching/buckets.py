"""Images in several shapes: each goes to the bucket nearest to its own.

A bucket is a height and a width that images are scaled and cropped to. All
images of a batch are of one bucket (Podell et al., arXiv 2307.01952, section
2.3), and batch k is a pure function of the arguments and k, as everywhere:

  assigned = assign(sizes_of(source), buckets)
  plan = BucketPlan(assigned, len(buckets), batch_size, seed)
  plan.batch(k) -> (bucket, image numbers)
"""

import bisect
import concurrent.futures
import dataclasses
import functools
import math

import numpy as np

from lavit_jax.core import errors, image_io
from lavit_jax.data.batching import packing

NONE = -1  # the bucket of an image that cannot be read
_TURNS_KEPT = 256  # batches whose place in their bucket stays in memory
_THREADS = 8  # that read headers


def sizes_of(source) -> np.ndarray:
  """int32[num_images, 2], heights and widths of a source's own images.

  Told by the headers alone; (0, 0) for an image that cannot be read. A source
  that only has squares (one without `encoded`) is not looked at.
  """
  if not hasattr(source, "encoded"):
    return np.full((source.num_images, 2), source.image_size, np.int32)

  def one(i):
    try:
      return image_io.size_of(source.encoded(i), name=source.image_key(i))
    except image_io.ImageError:
      return 0, 0  # named in the log when its turn comes

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    sizes = list(pool.map(one, range(source.num_images)))
  return np.array(sizes, np.int32).reshape(-1, 2)


def assign(sizes: np.ndarray, buckets) -> np.ndarray:
  """The bucket of each image, whose ratio is nearest to the image's.

  Args:
    sizes: int[n, 2], heights and widths.
    buckets: heights and widths of the buckets.

  Returns:
    int8[n]; NONE where a size is (0, 0). The nearest is that of the least
    |log ratio|, the earlier of two: [[30, 40], [0, 0]] in ((8, 8), (6, 8))
    gives [1, -1].

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
    numbers: SDXL's six: height and width of the image, top and left of the
      crop in the scaled image, height and width of the bucket.
  """

  box: tuple[float, float, float, float]
  numbers: tuple[int, int, int, int, int, int]


def view(size, bucket, place=(0.5, 0.5)) -> View:
  """The largest part with the bucket's ratio.

  Args:
    size: height and width of the image.
    bucket: height and width of the bucket.
    place: where the part lies, from 0 (top, left) to 1 (bottom, right).

  Returns:
    A View; view((80, 200), (40, 40)) has the box (60, 0, 140, 80) and the
    numbers (80, 200, 0, 30, 40, 40).
  """
  (height, width), (rows, columns) = size, bucket
  scale = max(rows / height, columns / width)  # of the smallest that covers
  part = min(rows / scale, height), min(columns / scale, width)
  top = (height - part[0]) * place[0]
  left = (width - part[1]) * place[1]
  box = left, top, left + part[1], top + part[0]
  crop = round(top * scale), round(left * scale)
  return View(box, (height, width, *crop, rows, columns))


class BucketPlan:
  """Batch number to a bucket and the images of a batch, without an end.

  Each bucket is gone through in an order of its own, shuffled anew each time.
  Of every N batches, N images in all, a bucket of n images has exactly n,
  spread evenly: so each image is shown as often as any other. A bucket with
  fewer images than a batch has its turn the more seldom, and then shows each
  several times: a single one is shown B times, once in B epochs.

  Batch k stands for image (k A + c) mod N of the images laid out bucket
  by bucket, A coprime to N and near the golden section of it (a Weyl sequence
  with exact integers), and is of that image's bucket.
  """

  def __init__(self, assigned, count, batch_size, seed):
    """Makes the plan.

    Args:
      assigned: int[n], the bucket of each image, see `assign`.
      count: number of buckets.
      batch_size: images a batch.
      seed: of all orders.

    Raises:
      errors.DataError: no image has a bucket.
    """
    self._members = members(assigned, count)
    self._size = batch_size
    self._orders = [
      packing.Permutation(max(len(m), 1), packing.make_seed(seed, b))
      for b, m in enumerate(self._members)
    ]
    self._ends = np.cumsum([len(m) for m in self._members]).tolist()
    total = self._ends[-1]
    self._stride = _golden(total)
    self._first = packing.make_seed(seed) % total
    self._turn = functools.lru_cache(maxsize=_TURNS_KEPT)(self._find_turn)

  def bucket(self, k) -> int:
    """The bucket of batch k."""
    place = (int(k) * self._stride + self._first) % self._ends[-1]
    return bisect.bisect_right(self._ends, place)

  def _find_turn(self, k):
    """(bucket of batch k, how many batches before it were of that bucket)."""
    b, total = self.bucket(k), self._ends[-1]
    begin = self._ends[b - 1] if b else 0
    # x mod N lies in [s, e) where floor((x - s) / N) - floor((x - e) / N) is 1.
    since, until = (
      _floor_sum(k, total, self._stride, self._first - edge)
      for edge in (begin, self._ends[b])
    )
    return b, since - until

  def image(self, k, j) -> int:
    """Image j of batch k."""
    b, ordinal = self._turn(int(k))
    return int(self._members[b][self._orders[b][ordinal * self._size + j]])

  def batch(self, k) -> tuple[int, np.ndarray]:
    """The bucket and the images int64[batch_size] of batch k."""
    return self.bucket(k), np.array(
      [self.image(k, j) for j in range(self._size)], np.int64
    )


class OnePass:
  """The plan that shows each image once; the last batch of a bucket has gaps.

  Its interface is that of `BucketPlan`, with a length; a gap is NONE.
  """

  def __init__(self, assigned, count, batch_size):
    """Makes the plan; arguments and errors are those of `BucketPlan`."""
    self._members, self._size = members(assigned, count), batch_size
    turns = [
      (start, b)
      for b, m in enumerate(self._members)
      for start in range(0, len(m), batch_size)
    ]
    self._turns = sorted(turns)  # all buckets in turn: the first few show each

  def __len__(self):
    """Number of batches."""
    return len(self._turns)

  def bucket(self, k) -> int:
    """The bucket of batch k."""
    return self._turns[k][1]

  def image(self, k, j) -> int:
    """Image j of batch k, NONE for a gap."""
    start, b = self._turns[k]
    place, chosen = start + j, self._members[b]
    return int(chosen[place]) if place < len(chosen) else NONE


def members(assigned, count) -> list[np.ndarray]:
  """The images of each bucket.

  Raises:
    errors.DataError: there is none in any.
  """
  found = [np.flatnonzero(np.asarray(assigned) == b) for b in range(count)]
  if not any(len(m) for m in found):
    raise errors.DataError(
      f"None of {len(assigned)} images can be read: check the paths of the"
      " data."
    )
  return found


def rare(assigned, count, batch_size) -> dict[int, int]:
  """Images of each bucket that has some, but fewer than a batch."""
  sizes = [len(chosen) for chosen in members(assigned, count)]
  return {b: n for b, n in enumerate(sizes) if 0 < n < batch_size}


def _golden(total) -> int:
  """The whole number coprime to `total` that is nearest its golden section."""
  start = round(total * (math.sqrt(5) - 1) / 2)
  near = (start + sign * step for step in range(total) for sign in (1, -1))
  return next(a for a in near if a > 0 and math.gcd(a, total) == 1)


def _floor_sum(count, divisor, slope, start) -> int:
  """Sum of floor((slope i + start) / divisor) for i = 0 ... count - 1, exact.

  By Euclid's algorithm, in O(log divisor) steps (Graham, Knuth, Patashnik,
  Concrete Mathematics, section 3.5): whole parts are summed in closed form,
  what is left is the same sum with slope and divisor exchanged.
  """
  total = 0
  while count > 0:
    whole, slope = divmod(slope, divisor)
    total += whole * count * (count - 1) // 2
    whole, start = divmod(start, divisor)
    total += whole * count
    count, start = divmod(slope * count + start, divisor)
    slope, divisor = divisor, slope
  return total
