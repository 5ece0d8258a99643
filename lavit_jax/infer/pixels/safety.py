"""Runs the safety checker that came with a model on generated images."""

import functools
import os
from collections.abc import Sequence

import jax
import numpy as np
import PIL.Image

from lavit_jax.core import image_io
from lavit_jax.core.storage import checkpoints
from lavit_jax.infer import batches
from lavit_jax.models.pixels import safety

PART = "safety"
MARK = "withheld"  # key of an image's `info`


class Checker:
  """The safety checker of Stable Diffusion, part `safety`."""

  def __init__(self, directory: str | os.PathLike):
    """Reads the part of a model directory.

    Raises:
      errors.CheckpointError: it is missing or damaged.
    """
    part = checkpoints.load_part(directory, PART)
    self._config = safety.SafetyConfig(**part.meta["safety"])
    self._params = part.params

  @functools.cached_property
  def _withheld(self):
    net = safety.SafetyChecker(self._config)

    def withheld(params, images):
      pixels = image_io.normalize(images)
      return safety.withheld(*net.apply({"params": params}, pixels))

    return jax.jit(withheld)

  def check(self, images: Sequence[PIL.Image.Image]) -> list[PIL.Image.Image]:
    """Returns the images; those withheld are black, see `is_withheld`."""
    size = self._config.image_size
    small = np.stack([clip_square(image, size) for image in images])
    flags = []
    for chunk, count, _ in batches.chunks(small):
      flags += np.asarray(self._withheld(self._params, chunk))[:count].tolist()
    return [
      _black(image) if flag else image
      for image, flag in zip(images, flags, strict=True)
    ]


def is_withheld(image: PIL.Image.Image) -> bool:
  """Whether the checker put this black image in place of another."""
  return bool(image.info.get(MARK))


def clip_square(image: PIL.Image.Image, size: int) -> np.ndarray:
  """Scales the shorter side and crops the centre: uint8[size, size, 3]."""
  width, height = image.size
  short = min(width, height)
  scaled = image.resize(
    (int(size * width / short), int(size * height / short)),
    PIL.Image.Resampling.BICUBIC,
  )
  left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
  return np.array(scaled.crop((left, top, left + size, top + size)), np.uint8)


def _black(image):
  black = PIL.Image.new("RGB", image.size)
  black.info[MARK] = True
  return black
