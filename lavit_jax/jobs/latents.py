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
from lavit_jax.data.caches import latents
from lavit_jax.data.images import image_bytes, image_sizes
from lavit_jax.data.sources import kinds
from lavit_jax.train.objectives.frozen import conditioning, latent_parts


def write_cache(
  model: str | os.PathLike[str],
  kind: str,
  data: Mapping[str, Any],
  out: str | os.PathLike[str],
  *,
  split: str = "train",
  batch: int = 8,
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
    batch: images encoded at once.
    quiet: no progress bar.

  Returns:
    `images`, the number of images; `bad`, that of unreadable ones; `bytes`, the
    size of the cache; `out`, the directory.

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
  encode = _encoder(net, params)
  with progress.Progress(
    int((assigned != buckets_lib.NONE).sum()),
    start=latents.resume_point(out, meta),
    label=f"latents {split}",
    stream=io.StringIO() if quiet else None,
  ) as bar:
    records = lambda numbers: _records(
      source, meta, assigned, numbers, (encode, batch), log, bar
    )
    written = latents.write(out, records, meta, assigned)
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


def _encoder(net, params):
  """Returns a function from uint8[B, H, W, 3] to means float16[B, h, w, C]."""

  @jax.jit
  def encode(params, images):
    x = conditioning.to_unit(images)
    mean, _ = net.apply({"params": params}, x, method="encode")
    return mean.astype("float16")

  params = jax.device_put(params)
  return lambda images: np.asarray(encode(params, images))


def _records(
  source, meta, assigned, numbers, encoder, log, bar
) -> Iterator[latents.Record]:
  """Yields latents of the images `numbers`; None for a bad one."""
  encode, size = encoder
  done = before = int((assigned != buckets_lib.NONE).sum()) - len(numbers)
  for chunk in _chunks(numbers, assigned, size):
    bucket = meta.buckets[assigned[chunk[0]]]
    pixels = np.zeros((size, *bucket, 3), np.uint8)
    good = np.zeros(len(chunk), bool)
    for row, i in enumerate(chunk):
      try:
        image = bucket_rows.original(source, int(i))
        view = buckets_lib.view(image.size[::-1], bucket)
        pixels[row] = image_io.cut(image, view.box, bucket)
        good[row] = True
        log.good()
      except image_io.ImageError as error:
        log.fault(source.image_key(int(i)), error)
    if not before and done + len(chunk) == len(numbers):
      log.check()  # there may be too few images for `log.fault` to check
    encoded = encode(pixels)
    yield from (encoded[row] if ok else None for row, ok in enumerate(good))
    done += len(chunk)
    bar.update(done, examples=len(chunk))


def _chunks(numbers, assigned, size):
  """Yields chunks of at most `size` images, in order, each of one bucket."""
  start = 0
  for end in range(1, len(numbers) + 1):
    full = end - start == size or end == len(numbers)
    if full or assigned[numbers[end]] != assigned[numbers[start]]:
      yield numbers[start:end]
      start = end
