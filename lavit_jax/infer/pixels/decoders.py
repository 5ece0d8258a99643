"""Pixel decoders: visual tokens to images.

A model directory may have several; NEEDS lists the parts of each:

  highres   1024 px in six ratios, by the U-Net of SDXL, as the official release
  lowres    512 px, by the U-Net of Stable Diffusion 1.5, likewise
  pixels    the small decoder of squares that is trained here without latents

`load` returns one of them, see `pixel_space.py` and `latent_space.py`.
"""

import os
from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np

from lavit_jax.core import errors
from lavit_jax.infer import batches, ranges
from lavit_jax.infer.loading import made_of, visual
from lavit_jax.infer.pixels import latent_space, options, pixel_space

NEEDS = {  # the first whose parts are all there is the default
  "highres": ("highres", "highres_pixels"),
  "lowres": ("lowres", "lowres_pixels"),
  "pixels": ("pixels",),
}


class PixelDecoder(Protocol):
  """The interface of the decoders that `load` returns."""

  @property
  def batch_sizes(self) -> Sequence[int]:
    """To which batches are padded, ascending."""
    ...

  def check(self, settings: options.PixelOptions) -> None:
    """Raises UsageError for options that the decoder does not take."""

  def decode(
    self,
    tokens: visual.VisualTokenizer,
    codes: Sequence[np.ndarray],
    seeds: np.ndarray,
    settings: options.PixelOptions,
    progress: options.Progress | None = None,
  ) -> np.ndarray:
    """Decodes a batch; image i depends on codes[i] and seeds[i] alone.

    Args:
      tokens: the tokenizer of the codes.
      codes: int[k] for each image, 1 <= k <= N.
      seeds: int[B], of the noise.
      settings: as `check` takes them.
      progress: called with (steps done, steps) after each step.

    Returns:
      float32[B, H, W, 3] in [0, 1].
    """
    ...


def available(parts: Collection[str]) -> list[str]:
  """Returns the kinds that a model with these parts has, the default first."""
  return [kind for kind, need in NEEDS.items() if set(need) <= set(parts)]


def preferred(parts: Collection[str]) -> str:
  """Returns the default kind, or if none is complete the most complete one."""
  missing = lambda kind: len(set(NEEDS[kind]) - set(parts)) / len(NEEDS[kind])
  nearest = min(NEEDS, key=missing)
  return nearest if missing(nearest) < 1 else "pixels"


def choose(parts: Collection[str], kind: str | None = None) -> str:
  """Returns the requested kind, or the default one.

  Args:
    parts: of the model.
    kind: of NEEDS; None: the default.

  Raises:
    errors.UsageError: there is no such kind.
    errors.CheckpointError: the model lacks parts of it.
  """
  if kind is not None and kind not in NEEDS:
    raise errors.UsageError(
      f"There is no pixel decoder {kind!r}: give one of {', '.join(NEEDS)}."
    )
  chosen = kind or preferred(parts)
  missing = [part for part in NEEDS[chosen] if part not in parts]
  if not missing:
    return chosen
  others = available(parts)
  hint = (
    f"It has the pixel decoder {', '.join(others)}."
    if others
    else "It can read, and generate visual tokens (write_codes). Train or"
    " import a pixel decoder, see 'Official weights' in the README."
  )
  raise errors.CheckpointError(
    f"The pixel decoder {chosen} needs the parts {', '.join(NEEDS[chosen])},"
    f" and the model has no {', '.join(missing)}. {hint}"
  )


def load(
  directory: str | os.PathLike, kind: str, dtype: str = "float32"
) -> PixelDecoder:
  """Reads a pixel decoder.

  Args:
    directory: a model directory with the parts of the kind.
    kind: of NEEDS.
    dtype: of the computation in a U-Net. The decoder `pixels`, and
      autoencoders that require it, compute in float32 in any case.

  Raises:
    errors.CheckpointError: a part is damaged, lacks a network, or was trained
      with another tokenizer.
  """
  for part in NEEDS[kind]:
    made_of.check_made_of(directory, part)
  if kind == "pixels":
    return pixel_space.PixelSpaceDecoder(directory)
  return latent_space.LatentSpaceDecoder(directory, kind, dtype)


def decode(
  decoder: PixelDecoder,
  tokens: visual.VisualTokenizer,
  codes: Sequence[np.ndarray],
  seed: int,
  settings: options.PixelOptions,
  *,
  limit: int,
  progress: options.Progress | None = None,
) -> list[np.ndarray]:
  """Decodes images from visual tokens, chunk by chunk.

  Args:
    decoder: from `load`.
    tokens: the tokenizer of the codes.
    codes: int[k] for each image, 1 <= k <= N.
    seed: image i takes the noise of seed + i, whatever the batch.
    settings: options of decoding.
    limit: images at once; latents have a lower limit of their own.
    progress: called with (steps done, steps), counted over all chunks.

  Returns:
    float32[H, W, 3] in [0, 1] for each image.

  Raises:
    errors.UsageError: options that the decoder does not take, or codes out of
      range.
  """
  decoder.check(settings)
  ranges.check_codes(codes)
  tokens.padded(codes)  # all codes are checked before any is decoded
  sizes = decoder.batch_sizes
  chunks = list(batches.chunks(list(codes), min(limit, sizes[-1]), sizes))
  images: list[np.ndarray] = []
  for number, (chunk, count, start) in enumerate(chunks):
    seeds = np.arange(len(chunk), dtype=np.int32) + seed + start
    report = progress and _of_chunk(progress, number, len(chunks))
    batch = decoder.decode(tokens, chunk, seeds, settings, report)
    images += list(batch)[:count]
  return images


def _of_chunk(progress, number, chunks):
  """Returns a callback for one chunk that reports over all chunks."""
  return lambda done, steps: progress(number * steps + done, chunks * steps)
