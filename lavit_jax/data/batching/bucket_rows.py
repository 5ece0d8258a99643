"""Rows of bucketed images: what a plan's row number becomes as arrays.

The image that is learnt, or its latents; what the tokenizer sees of it, which
is the same part; and SDXL's numbers of size and place.
"""

import dataclasses
import logging

import grain.python as grain
import numpy as np

from lavit_jax.core import errors, image_io
from lavit_jax.data import faults as faults_lib
from lavit_jax.data.batching import buckets as buckets_lib
from lavit_jax.data.batching import pipeline

_LOG = logging.getLogger(__name__)
CROPS = ("center", "random")
_ENDLESS = 1 << 48  # rows of an endless dataset


def batches(
  source,
  buckets,
  batch_size,
  *,
  seed=None,
  crop="center",
  latents=None,
  limit_share=0.05,
) -> pipeline.Batches:
  """Batches of images, each batch of one bucket.

  Args:
    source: an examples.Source; with `encoded`, its images keep their ratio.
    buckets: heights and widths.
    batch_size: global number of images.
    seed: of the endless order, see `buckets.BucketPlan`; None: each image once,
      the last batch of a bucket filled up with zeros.
    crop: "center", or "random" for another part each time (needs a seed).
    latents: a latent_cache.LatentCache; its latents stand in for the image
      that is learnt, and it says which bucket an image has.
    limit_share: share of bad images that stops the run.

  Returns:
    Batches of `valid` float32[B], `index` int64[B], `sizes` float32[B, 6] (see
    `View`), `image` uint8[B, S, S, 3], what the tokenizer sees; and of `target`
    uint8[B, h, w, 3], what is learnt, or `latents` float16[B, h, w, C].

  Raises:
    errors.ConfigError: no such crop, or a crop that does not go with a cache.
    errors.DataError: no image can be read, or a cache of other data.
  """
  _check(source, crop, seed, latents)
  buckets = [tuple(int(side) for side in pair) for pair in buckets]
  if latents is None:
    assigned = buckets_lib.assign(buckets_lib.sizes_of(source), buckets)
  else:
    assigned = latents.assigned
  if seed is not None:
    _name_rare(source, buckets, assigned, batch_size)
  plan_of = buckets_lib.OnePass if seed is None else buckets_lib.BucketPlan
  rest = () if seed is None else (seed,)
  plan = plan_of(assigned, len(buckets), batch_size, *rest)
  log = faults_lib.FaultLog(f"images of {source.name}", limit_share)
  _name_unreadable(source, assigned, log)
  place_seed = seed if crop == "random" else None
  rows = _Rows(source, buckets, plan, batch_size, log, latents, place_seed)
  length = _ENDLESS if seed is not None else len(plan) * batch_size
  return pipeline.Batches(
    grain.MapDataset.range(length).map(rows), batch_size, (log,)
  )


def _check(source, crop, seed, latents):
  """Everything that can be known to be wrong before an image is read."""
  if crop not in CROPS:
    raise errors.ConfigError(f"data.crop={crop!r}: expected one of {CROPS}.")
  if crop == "random" and (latents is not None or seed is None):
    raise errors.ConfigError(
      'data.crop="random" shows another part of an image each time, but'
      " cached latents, and held-out images, are those of one part. Use"
      " crop='center', or no cache."
    )
  if latents is not None and len(latents) != source.num_images:
    raise errors.DataError(
      f"The latent cache {latents.directory} has {len(latents)} images, but"
      f" {source.name} has {source.num_images}: it was made from other data."
      " Make it again for this data."
    )


def _name_unreadable(source, assigned, log):
  """Counts images without a bucket, and names them."""
  log.good(int((assigned != buckets_lib.NONE).sum()))
  for i in np.flatnonzero(assigned == buckets_lib.NONE):
    log.fault(source.image_key(int(i)), "cannot be read")


def _name_rare(source, buckets, assigned, batch_size):
  """Says where a batch will show the same image several times."""
  found = buckets_lib.rare(assigned, len(buckets), batch_size)
  if not found:
    return
  assigned = np.asarray(assigned)
  counts = np.bincount(assigned[assigned != buckets_lib.NONE])
  others = np.count_nonzero(counts) > len(found)  # that could take them in
  way_out = (
    ". Take it from data.buckets to put them into the nearest other one"
    if others
    else f". Give more images, or a batch_size of at most {counts.max()}"
  )
  for b, n in found.items():
    _LOG.warning(
      "bucket %s has %d of the %d images of %s: its batches of %d show each"
      " about %.3g times, and come once in %.3g epochs%s",
      buckets[b],
      n,
      int(counts.sum()),
      source.name,
      batch_size,
      batch_size / n,
      batch_size / n,
      way_out,
    )


@dataclasses.dataclass
class _Rows:
  """Row number to the arrays of one image; all of a batch in one shape."""

  source: object
  buckets: list
  plan: object
  batch_size: int
  log: faults_lib.FaultLog
  latents: object = None
  place_seed: int | None = None

  def __call__(self, number):
    k, j = divmod(int(number), self.batch_size)
    size = self.buckets[self.plan.bucket(k)]
    i = self.plan.image(k, j)
    if i == buckets_lib.NONE:
      return self._blank(size)
    try:
      row = self._row(number, i, size)
    except image_io.ImageError as error:
      self.log.fault(self.source.image_key(i), error)
      return self._blank(size) | {"index": np.int64(i)}
    self.log.good()
    return row | {"index": np.int64(i)}

  def _row(self, number, i, size):
    """The arrays of image i; ImageError if it is bad."""
    image = original(self.source, i)
    place = (0.5, 0.5)
    if self.place_seed is not None:
      rng = np.random.default_rng([self.place_seed, int(number)])
      place = tuple(rng.random(2))
    part = buckets_lib.view(image.size[::-1], size, place)
    side = self.source.image_size
    row = {
      "valid": np.float32(1),
      "sizes": np.array(part.numbers, np.float32),
      "image": image_io.cut(image, part.box, (side, side)),
    }
    if self.latents is None:
      row["target"] = image_io.cut(image, part.box, size)
    else:
      row["latents"] = self.latents.latents(i)
      row["valid"] *= self.latents.good(i)
    return row

  def _blank(self, size):
    """A row of zeros; its size is told all the same."""
    row = {"valid": np.float32(0), "index": np.int64(buckets_lib.NONE)}
    row["sizes"] = np.array((*size, 0, 0, *size), np.float32)
    side = self.source.image_size
    row["image"] = np.zeros((side, side, 3), np.uint8)
    if self.latents is not None:
      row["latents"] = np.zeros(self.latents.shape_of(size), np.float16)
    else:
      row["target"] = np.zeros((*size, 3), np.uint8)
    return row


def original(source, i):
  """Image i of a source as a PIL image, at its own size if it has one.

  Raises:
    images.ImageError: it cannot be used.
  """
  name = source.image_key(i)
  if hasattr(source, "encoded"):
    return image_io.load(source.encoded(i), name=name)
  return image_io.load(source.image(i), name=name)
