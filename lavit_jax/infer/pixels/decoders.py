"""Pixel decoders: visual words to images.

A model directory may have several, each of the parts that it NEEDS:

  highres   1024 px in six ratios by SDXL's U-Net, as the official release
  lowres    512 px by that of Stable Diffusion 1.5, likewise
  pixels    the small decoder of squares that is trained here without latents

`load` gives one of them, of `pixel_space.py` or `latent_space.py`. All have

  painter.paint(visual, codes, seeds, painting, progress) -> float32[B, H, W, 3]

in [0, 1], where image i depends on its words and seeds[i] only.
"""

from collections.abc import Collection, Sequence

import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors
from lavit_jax.infer import batches, visual
from lavit_jax.infer.loading import made_of
from lavit_jax.infer.pixels import latent_space, options, pixel_space

NEEDS = {  # the first that is whole is the default
  "highres": ("highres", "highres_pixels"),
  "lowres": ("lowres", "lowres_pixels"),
  "pixels": ("pixels",),
}


def available(parts: Collection[str]) -> list[str]:
  """The kinds that a model with these parts can paint by, the default first."""
  return [kind for kind, need in NEEDS.items() if set(need) <= set(parts)]


def preferred(parts: Collection[str]) -> str:
  """The default kind; where none is whole, one that has some of its parts."""
  lacking = lambda kind: len(set(NEEDS[kind]) - set(parts)) / len(NEEDS[kind])
  nearest = min(NEEDS, key=lacking)
  return nearest if lacking(nearest) < 1 else "pixels"


def choose(parts: Collection[str], kind: str | None = None) -> str:
  """The kind asked for, or the default one.

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
    f"It can draw by {', '.join(others)}."
    if others
    else "It can read, and write visual words (write_codes). Train or import a"
    " pixel decoder, see 'Official weights' in the README."
  )
  raise errors.CheckpointError(
    f"The pixel decoder {chosen} needs the parts {', '.join(NEEDS[chosen])},"
    f" and the model has no {', '.join(missing)}. {hint}"
  )


def load(directory, kind: str, dtype: str = "float32"):
  """A `own.Own` or a `latent.Latent`.

  Args:
    directory: a model directory.
    kind: of NEEDS, its parts there.
    dtype: of computation in a U-Net; what is drawn without latents, and
      autoencoders that ask for it, are float32 in any case.

  Raises:
    errors.CheckpointError: a part is damaged, lacks a network, or was trained
      on other words.
  """
  for part in NEEDS[kind]:
    made_of.check_made_of(directory, part)
  if kind == "pixels":
    return pixel_space.PixelSpaceDecoder(directory)
  return latent_space.LatentSpaceDecoder(directory, kind, dtype)


def paint(
  painter,
  tokens: visual.VisualTokenizer,
  codes: Sequence[np.ndarray],
  seed: int,
  how: options.PixelOptions,
  *,
  limit: int,
  progress: options.Progress | None = None,
) -> list[np.ndarray]:
  """Images of lists of codes, chunk by chunk.

  Args:
    painter: what `load` gave.
    tokens: the tokenizer that the codes belong to.
    codes: int[k] each, 1 <= k <= N.
    seed: image i takes the noise of seed + i, whatever the batch.
    how: options.
    limit: images at once; latents have a lower limit of their own.
    progress: called with (steps done, steps) over all chunks.

  Returns:
    float32[H, W, 3] in [0, 1] for each.

  Raises:
    errors.UsageError: options that the painter cannot follow, or codes that
      are none.
  """
  painter.check(how)
  tokens.padded(codes)  # all are looked at before the first is painted
  sizes = painter.batch_sizes
  parts = list(batches.chunks(list(codes), min(limit, sizes[-1]), sizes))
  drawn = []
  for number, (chunk, count, start) in enumerate(parts):
    seeds = jnp.arange(len(chunk), dtype=jnp.int32) + seed + start
    tell = progress and _shifted(progress, number, len(parts))
    drawn += list(painter.paint(tokens, chunk, seeds, how, tell))[:count]
  return drawn


def _shifted(progress, number, parts):
  """`progress` of one of several chunks."""
  return lambda done, steps: progress(number * steps + done, parts * steps)
