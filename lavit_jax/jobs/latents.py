"""Writes an autoencoder's latents of a dataset to disk (`lavit latents`)."""

import io
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lavit_jax.core import image_io, progress
from lavit_jax.core.storage import files
from lavit_jax.data import examples, faults
from lavit_jax.data.batching import bucket_rows
from lavit_jax.data.batching import buckets as buckets_lib
from lavit_jax.data.caches import latents, shards
from lavit_jax.data.images import image_bytes, image_sizes
from lavit_jax.data.sources import kinds
from lavit_jax.infer.loading import spread
from lavit_jax.train.objectives.frozen import conditioning, latent_parts


def write_cache(
  model: str | os.PathLike[str],
  kind: str,
  data: Mapping[str, Any],
  out: str | os.PathLike[str],
  *,
  split: str = "train",
  batch: int = 8,
  part: tuple[int, int] = (0, 1),
  quiet: bool = False,
) -> dict[str, Any]:
  """Writes the latents of all images, each cropped to its bucket.

  If it is interrupted, the next call resumes. Images that cannot be read are
  marked in the cache, counted and logged.

  Args:
    model: a model directory whose part `kind`_pixels has an autoencoder.
    kind: "lowres" or "highres".
    data: config.data of the training that will use the cache, with `buckets`.
    out: the cache's directory; it appears when it is complete.
    split: "train" or "held_out".
    batch: images that a device encodes at once.
    part: (number of this process, number of all) that write one cache.
    quiet: no progress bar.

  Returns:
    `images`, the number of images; `bad`, that of unreadable ones; `bytes`, the
    size of the cache; `out`, the directory. Of another part than the first its
    `images`, `out` and `part`.

  Raises:
    errors.LavitError: the model has no autoencoder, the data cannot be read,
      or the directory holds another cache.
  """
  files.require_local(out, "a latent cache")
  source = kinds.build(data, split)
  net, params = latent_parts.load_vae(os.fspath(model), kind)
  latent_parts.check_buckets(data["buckets"], net.config)
  description = kinds.describe(data, split, source)
  meta = _meta(source, data["buckets"], net, params, description, model)
  assigned = buckets_lib.assign(image_sizes.of(source), meta.buckets)
  log = faults.FaultLog("images", faults.share_of(data))
  encoder = _Encoder(net, params, batch)
  total, done = (
    latents.size_of(assigned, part),
    latents.resume_point(out, meta, part),
  )
  with progress.Progress(
    total,
    start=done,
    label=shards.label("latents", split, part),
    stream=io.StringIO() if quiet else None,
  ) as bar:
    reader = _Reader(source, meta, assigned, encoder, log, bar, done)
    written = latents.write(
      out,
      reader.records,
      meta,
      assigned,
      part,
      quiet=quiet,
      together=jax.process_count() > 1,
    )
  if written is None:
    return {"images": total, "out": str(pathlib.Path(out)), "part": part[0] + 1}
  good = sum(written.good(i) for i in range(len(written)))
  return {
    "images": len(written),
    "bad": len(written) - good,
    "bytes": sum(x.stat().st_size for x in pathlib.Path(out).iterdir()),
    "out": str(pathlib.Path(out)),
  }


def _meta(source, buckets, net, params, description, model):
  """Returns what the cache is made from."""
  return latents.Meta(
    source=examples.fingerprint(source),
    vae=latent_parts.fingerprint(params, net.config),
    num_images=source.num_images,
    buckets=buckets,
    scale=net.config.scale,
    channels=net.config.latent_channels,
    data=description,
    model=str(model),
    pictures=image_bytes.of(source),
  )


class _Encoder:
  """Encodes images on all devices of this process, a group on each.

  What is encoded together, and by which program, does not depend on how many
  there are.
  """

  def __init__(self, net, params, group: int):
    def encode(params, images):
      x = conditioning.to_unit(images)
      mean, _ = net.apply({"params": params}, x, method="encode")
      return mean.astype("float16")

    mesh = spread.mesh_of(jax.local_devices())
    self.size = group * mesh.size
    self._params = jax.device_put(params, spread.everywhere(mesh))
    self._placed = spread.a_group_each(mesh)
    self._encode = spread.over_groups(encode, mesh)

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """Encodes uint8[size, H, W, 3] to means float16[size, h, w, C]."""
    placed = jax.device_put(images, self._placed)
    return np.asarray(self._encode(self._params, placed))


class _Reader:
  """Encodes the images of a source, chunk by chunk."""

  def __init__(self, source, meta, assigned, encoder, log, bar, done):
    self._source, self._meta, self._assigned = source, meta, assigned
    self._encoder, self._log = encoder, log
    self._bar, self._done = bar, done

  def records(self, numbers: np.ndarray) -> Iterator[latents.Record]:
    """Yields latents of the images `numbers`; None for a bad one."""
    size = self._encoder.size
    for chunk in _chunks(numbers, self._assigned, size):
      bucket = self._meta.buckets[self._assigned[chunk[0]]]
      pixels = np.zeros((size, *bucket, 3), np.uint8)
      good = np.zeros(len(chunk), bool)
      for row, i in enumerate(chunk):
        good[row] = self._read(int(i), bucket, pixels[row])
      encoded = self._encoder(pixels)
      yield from (encoded[row] if ok else None for row, ok in enumerate(good))
      self._done += len(chunk)
      self._bar.update(self._done, examples=len(chunk))
    if len(numbers) == (self._assigned != buckets_lib.NONE).sum():
      self._log.check()  # there may be too few for `log.fault` to check

  def _read(self, number, bucket, pixels) -> bool:
    """Writes an image to `pixels`; returns whether it could be read."""
    try:
      image = bucket_rows.original(self._source, number)
    except image_io.ImageError as error:
      self._log.fault(self._source.image_key(number), error)
      return False
    view = buckets_lib.view(image.size[::-1], bucket)
    pixels[...] = image_io.cut(image, view.box, bucket)
    self._log.good()
    return True


def _chunks(numbers, assigned, size):
  """Yields chunks of at most `size` images, in order, each of one bucket."""
  start = 0
  for end in range(1, len(numbers) + 1):
    full = end - start == size or end == len(numbers)
    if full or assigned[numbers[end]] != assigned[numbers[start]]:
      yield numbers[start:end]
      start = end
