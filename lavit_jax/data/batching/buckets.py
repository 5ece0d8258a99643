"""Pictures in several shapes: each goes to the bucket nearest to its own.

A bucket is a height and a width that pictures are scaled and cropped to. All
pictures of a batch are of one bucket (Podell et al., arXiv 2307.01952, section
2.3), and batch k is a pure function of the arguments and k, as everywhere:

  plan = Plan(assign(sizes_of(source), buckets), len(buckets), batch_size, seed)
  plan.batch(k) -> (bucket, picture numbers)
"""

import bisect
import concurrent.futures
import dataclasses
import functools
import math

import numpy as np

from lavit_jax.core import errors, images
from lavit_jax.data.batching import packing

NONE = -1  # the bucket of a picture that cannot be read
_TURNS_KEPT = 256  # batches whose place in their bucket stays in memory
_THREADS = 8  # that read headers


def sizes_of(source) -> np.ndarray:
  """int32[num_images, 2], heights and widths of a source's own pictures.

  Told by the headers alone; (0, 0) for a picture that cannot be read. A source
  that only has squares (one without `encoded`) is not looked at.
  """
  if not hasattr(source, "encoded"):
    return np.full((source.num_images, 2), source.image_size, np.int32)

  def one(i):
    try:
      return images.size_of(source.encoded(i), name=source.image_key(i))
    except images.ImageError:
      return 0, 0  # named in the log when its turn comes

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    sizes = list(pool.map(one, range(source.num_images)))
  return np.array(sizes, np.int32).reshape(-1, 2)


def assign(sizes: np.ndarray, buckets) -> np.ndarray:
  """The bucket of each picture, whose ratio is nearest to the picture's.

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
  """The part of a picture that fills a bucket.

  Attributes:
    box: left, top, right and bottom of the part, in the picture's pixels.
    numbers: SDXL's six: height and width of the picture, top and left of the
      crop in the scaled picture, height and width of the bucket.
  """

  box: tuple[float, float, float, float]
  numbers: tuple[int, int, int, int, int, int]


def view(size, bucket, place=(0.5, 0.5)) -> View:
  """The largest part with the bucket's ratio.

  Args:
    size: height and width of the picture.
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


class Plan:
  """Batch number to a bucket and the pictures of a batch, without an end.

  Each bucket is gone through in an order of its own, shuffled anew each time.
  Of every N batches, N pictures in all, a bucket of n pictures has exactly n,
  spread evenly: so each picture is shown as often as any other. A bucket with
  fewer pictures than a batch has its turn the more seldom, and then shows each
  several times: a single one is shown B times, once in B epochs.

  Batch k stands for picture (k A + c) mod N of the pictures laid out bucket
  by bucket, A coprime to N and near the golden section of it (a Weyl sequence
  with exact integers), and is of that picture's bucket.
  """

  def __init__(self, assigned, count, batch_size, seed):
    """Makes the plan.

    Args:
      assigned: int[n], the bucket of each picture, see `assign`.
      count: number of buckets.
      batch_size: pictures a batch.
      seed: of all orders.

    Raises:
      errors.DataError: no picture has a bucket.
    """
    self._members = members(assigned, count)
    self._size = batch_size
    self._orders = [
      packing.Order(max(len(m), 1), packing.make_seed(seed, b))
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

  def picture(self, k, j) -> int:
    """Picture j of batch k."""
    b, ordinal = self._turn(int(k))
    return int(self._members[b][self._orders[b][ordinal * self._size + j]])

  def batch(self, k) -> tuple[int, np.ndarray]:
    """The bucket and the pictures int64[batch_size] of batch k."""
    return self.bucket(k), np.array(
      [self.picture(k, j) for j in range(self._size)], np.int64
    )


class Once:
  """The plan that shows each picture once; the last batch of a bucket has gaps.

  Its interface is that of `Plan`, with a length; a gap is NONE.
  """

  def __init__(self, assigned, count, batch_size):
    """Makes the plan; arguments and errors are those of `Plan`."""
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

  def picture(self, k, j) -> int:
    """Picture j of batch k, NONE for a gap."""
    start, b = self._turns[k]
    place, chosen = start + j, self._members[b]
    return int(chosen[place]) if place < len(chosen) else NONE


def members(assigned, count) -> list[np.ndarray]:
  """The pictures of each bucket.

  Raises:
    errors.DataError: there is none in any.
  """
  found = [np.flatnonzero(np.asarray(assigned) == b) for b in range(count)]
  if not any(len(m) for m in found):
    raise errors.DataError(
      f"None of {len(assigned)} pictures can be read: check the paths of the"
      " data."
    )
  return found


def rare(assigned, count, batch_size) -> dict[int, int]:
  """Pictures of each bucket that has some, but fewer than a batch."""
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
