"""Turns the row numbers of a bucket plan into arrays of one image each.

A row holds the image to learn, or its latents; the tokenizer's view of it,
which is the same part of the image; and SDXL's size conditioning.
"""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import grain.python as grain
import numpy as np
from PIL import Image

from lavit_jax.core import errors, image_io
from lavit_jax.data import examples
from lavit_jax.data import faults as faults_lib
from lavit_jax.data.batching import buckets as buckets_lib
from lavit_jax.data.batching import pipeline
from lavit_jax.data.images import image_sizes
from lavit_jax.data.sources import mixed

_LOG = logging.getLogger(__name__)
CROPS = ("center", "random")
_ENDLESS = 1 << 48  # rows of an endless dataset


def batches(
  source: examples.Source,
  buckets: Iterable[Sequence[int]],
  batch_size: int,
  *,
  seed: int | None = None,
  crop: str = "center",
  latents: Any = None,
  limit_share: float = faults_lib.LIMIT_SHARE,
) -> pipeline.Batches:
  """Returns batches of images, each batch of one bucket.

  Args:
    source: an examples.Source; with `encoded`, its images keep their ratio.
    buckets: (height, width) of each bucket.
    batch_size: B, global number of images.
    seed: of the endless order, see `buckets.BucketPlan`; None: each image once,
      the last batch of a bucket filled up with zeros.
    crop: "center", or "random" for another part each time (needs a seed).
    latents: a caches.latents.LatentCache; its latents replace the image to
      learn, and it has the bucket of each image.
    limit_share: share of bad images that stops the run.

  Returns:
    Batches of `valid` float32[B], `index` int64[B], `sizes` float32[B, 6] (see
    `View`), `image` uint8[B, S, S, 3], the tokenizer's view; and of `target`
    uint8[B, h, w, 3], the image to learn, or `latents` float16[B, h, w, C].

  Raises:
    errors.ConfigError: no such crop, or a crop that does not fit a cache.
    errors.DataError: no image can be read, or a cache of other data.
  """
  _check(source, crop, seed, latents)
  sizes = [tuple(int(side) for side in pair) for pair in buckets]
  if latents is None:
    assigned = buckets_lib.assign(image_sizes.of(source), sizes)
  else:
    assigned = latents.assigned
  log = faults_lib.FaultLog(f"images of {source.name}", limit_share)
  _log_unreadable(source, assigned, log)
  unused = np.ones(source.num_images, bool)
  unused[examples.usable(source)] = False
  assigned = np.where(unused, buckets_lib.NONE, assigned)
  plan: buckets_lib.BucketPlan | buckets_lib.OnePass
  if seed is None:
    plan = buckets_lib.OnePass(assigned, len(sizes), batch_size)
    length = len(plan) * batch_size
  else:
    _warn_of_rare(source, sizes, assigned, batch_size)
    plan = buckets_lib.BucketPlan(assigned, len(sizes), batch_size, seed)
    length = _ENDLESS
  crop_seed = seed if crop == "random" else None
  rows = _Rows(source, sizes, plan, batch_size, log, latents, crop_seed)
  return pipeline.Batches(
    grain.MapDataset.range(length).map(rows),
    batch_size,
    (log,),
    lambda row: {"epoch": row / max(source.num_images, 1)},
  )


def _check(source, crop, seed, latents):
  """Raises every error that can be found before an image is read."""
  if isinstance(source, mixed.MixedSource) and seed is not None:
    weights = {part.name: part.weight for part in source.parts}
    if len(set(weights.values())) > 1:
      raise errors.ConfigError(
        f"config.data.sources have the weights {weights}, but batches of one"
        " size show all images equally often. Give all the same weight."
      )
  if crop not in CROPS:
    raise errors.ConfigError(f"data.crop={crop!r}: expected one of {CROPS}.")
  if crop == "random" and (latents is not None or seed is None):
    raise errors.ConfigError(
      'data.crop="random" shows another part of an image each time, but'
      " cached latents, and held-out images, are of one part only. Use"
      " crop='center', or no cache."
    )
  if latents is not None and len(latents) != source.num_images:
    raise errors.DataError(
      f"The latent cache {latents.directory} has {len(latents)} images, but"
      f" {source.name} has {source.num_images}: it was made from other data."
      " Make it again for this data."
    )


def _log_unreadable(source, assigned, log):
  """Counts images without a bucket, and logs them."""
  log.good(int((assigned != buckets_lib.NONE).sum()))
  for i in np.flatnonzero(assigned == buckets_lib.NONE):
    log.fault(source.image_key(int(i)), "cannot be read")


def _warn_of_rare(source, buckets, assigned, batch_size):
  """Warns of buckets whose batches will show an image several times."""
  rare = buckets_lib.rare(assigned, len(buckets), batch_size)
  if not rare:
    return
  assigned = np.asarray(assigned)
  counts = np.bincount(assigned[assigned != buckets_lib.NONE])
  others = np.count_nonzero(counts) > len(rare)  # that can take the images
  advice = (
    ". Remove it from data.buckets to put its images into the nearest other one"
    if others
    else f". Give more images, or a batch_size of at most {counts.max()}"
  )
  for b, n in rare.items():
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
      advice,
    )


@dataclasses.dataclass
class _Rows:
  """Maps a row number to the arrays of one image, of one shape in a batch."""

  source: examples.Source
  buckets: list[tuple[int, ...]]
  plan: buckets_lib.BucketPlan | buckets_lib.OnePass
  batch_size: int
  log: faults_lib.FaultLog
  latents: Any = None
  crop_seed: int | None = None  # None: centre crops

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
    """Returns the arrays of image i; ImageError if it is bad."""
    image = original(self.source, i)
    anchor = (0.5, 0.5)
    if self.crop_seed is not None:
      rng = np.random.default_rng([self.crop_seed, int(number)])
      anchor = tuple(rng.random(2))
    part = buckets_lib.view(image.size[::-1], size, anchor)
    side = self.source.image_size
    row = {
      "valid": np.float32(1),
      "sizes": np.array(part.sizes, np.float32),
      "image": image_io.cut(image, part.box, (side, side)),
    }
    if self.latents is None:
      row["target"] = image_io.cut(image, part.box, size)
    else:
      row["latents"] = self.latents.latents(i)
      row["valid"] *= self.latents.good(i)
    return row

  def _blank(self, size):
    """Returns a row of zeros, with the sizes of its bucket."""
    row = {"valid": np.float32(0), "index": np.int64(buckets_lib.NONE)}
    row["sizes"] = np.array((*size, 0, 0, *size), np.float32)
    side = self.source.image_size
    row["image"] = np.zeros((side, side, 3), np.uint8)
    if self.latents is not None:
      row["latents"] = np.zeros(self.latents.shape_of(size), np.float16)
    else:
      row["target"] = np.zeros((*size, 3), np.uint8)
    return row


def original(source: examples.Source, i: int) -> Image.Image:
  """Returns image i of a source as a PIL image, at its own size if it has one.

  Raises:
    image_io.ImageError: the image cannot be used.
  """
  name = source.image_key(i)
  if isinstance(source, examples.HasEncodedImages):
    return image_io.load(source.encoded(i), name=name)
  return image_io.load(source.image(i), name=name)
