"""Measures how fast a source becomes batches (`lavit data bench`)."""

import resource
import time
from collections.abc import Mapping
from typing import Any

from lavit_jax.core import errors, image_io
from lavit_jax.data import examples
from lavit_jax.data.batching import pipeline
from lavit_jax.data.images import decoding
from lavit_jax.data.sources import filtered, jsonl, kinds
from lavit_jax.jobs.prepare import job, looks

_DECODED = 256  # images that are decoded alone, at the most
_WARM = 2  # batches that are not timed


def measure(
  data: Mapping[str, Any] | str,
  *,
  fields: Mapping[str, Any] | None = None,
  seconds: float = 10.0,
  batch_size: int = 64,
  threads: int = 2,
) -> dict[str, Any]:
  """Makes batches of images for some time, and decodes images alone.

  Args:
    data: config.data, of which the split "train" is read; or a path.
    fields: override those of config.data: image_size, workers, decoding.
    seconds: how long batches are made.
    batch_size: images a batch.
    threads: threads that make batches.

  Returns:
    images_per_second of the loader; alone, images a second of one core that
    does nothing but read, decode and resize; of_alone, the first over the
    second; cores, CPU seconds a second of this process; memory, the most that
    this process had, in MiB.

  Raises:
    errors.DataError: the data cannot be read.
  """
  config, split = job.config_of(data, fields)
  source = kinds.build(config, split)
  if not source.num_images:
    raise errors.DataError(f"{source.name} holds no images.")
  if isinstance(whole := filtered.whole(source), jsonl.JsonlSource):
    whole.decode_anew()
  alone = _alone(source, decoding.way(config.get("decoding", "exact")))
  batches = pipeline.image_batches(source, batch_size, seed=0, limit_share=1.0)
  iterator = pipeline.iterate(batches, num_threads=threads)
  for _ in range(_WARM):
    next(iterator)
  begun, used, count = time.monotonic(), time.process_time(), 0
  while time.monotonic() < begun + seconds:
    next(iterator)
    count += batch_size
  elapsed = time.monotonic() - begun
  rate = count / elapsed
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  return {
    "name": source.name,
    "images_per_second": round(rate, 1),
    "alone": round(alone, 1),
    "of_alone": round(rate / alone, 3),
    "cores": round((time.process_time() - used) / elapsed, 2),
    "memory": round(peak),
    "workers": config.get("workers", 0),
    "threads": threads,
    "bad": batches.faults[0].bad,
  }


def _alone(source: examples.Source, decode: decoding.Decode) -> float:
  """Returns images a second of reading, decoding and resizing alone."""
  count = min(source.num_images, _DECODED)
  step, good = source.num_images / count, 0
  begun = time.process_time()
  for k in range(count):
    try:
      data = looks.encoded(source, int(k * step))
      decode(data, source.image_size, None)
      good += 1
    except image_io.ImageError:  # counted by the loader
      continue
  if not good:
    raise errors.DataError(f"{source.name}: none of {count} images is good.")
  return good / max(time.process_time() - begun, 1e-9)
