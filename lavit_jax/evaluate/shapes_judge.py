"""Reads the objects of a shapes image by plain image processing.

Analysis by synthesis in each quadrant: among the sprites of every shape, size,
position and colour, finds the one that explains most of the pixels that differ
from the ground. Nothing is learnt. The lightness of the ground, mild noise and
mild blur do not matter.
"""

import functools
import itertools

import numpy as np
from PIL import Image

from lavit_jax.data.shapes import render, scene

_SIZE = 48  # pixels a side, to which every image is resized
_HALF = _SIZE // 2
_REACH = 4  # largest offset of an object from the centre, in pixels
_LIGHTNESS_WEIGHT = 0.6  # a ground is grey: trust hue more than lightness
_AMPLITUDES = (0.6, 1.15)  # contrast relative to the palette
# Smallest gain relative to the energy of the sprite, and to that of all pixels
# of the quadrant that differ from the ground.
_MIN_STRENGTH = 0.3
_MIN_EXPLAINED = 0.35
_MAX_GROUND_CHROMA = 45
_KINDS = tuple(itertools.product(scene.SHAPES, scene.SIZES))
# Rows: two axes of hue and chroma, one of lightness.
_AXES = np.array(
  [
    [0.8165, -0.4082, -0.4082],
    [0.0, 0.7071, -0.7071],
    [0.5774 * _LIGHTNESS_WEIGHT] * 3,
  ],
  np.float32,
)


def judge(image: np.ndarray) -> list[scene.Object]:
  """Reads the objects of an image, in raster order of the quadrants.

  Args:
    image: uint8[H, W, 3]; resized to 48 px a side.

  Raises:
    ValueError: not an 8-bit RGB image.
  """
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
    raise ValueError(
      f"The image is {image.dtype}{list(image.shape)}; the judge reads"
      " uint8[H, W, 3]. Convert the image to 8-bit RGB first."
    )
  pixels = _resized(image)
  objects = [
    _read(pixels[y : y + _HALF, x : x + _HALF], quadrant)
    for quadrant, (y, x) in zip(
      scene.PLACES,
      ((0, 0), (0, _HALF), (_HALF, 0), (_HALF, _HALF)),
      strict=True,
    )
  ]
  return [obj for obj in objects if obj is not None]


def _resized(image):
  """Resizes to float32[48, 48, 3]."""
  if image.shape[:2] != (_SIZE, _SIZE):
    pil = Image.fromarray(image)
    image = pil.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR)
  return np.asarray(image, np.float32)


def _read(window, quadrant):
  """Returns the object of one quadrant float32[24, 24, 3], or None."""
  ground = _ground(window)
  pixels = (window - ground).reshape(-1, 3) @ _AXES.T  # [576, 3]
  sprites, energies = _bank()
  colors = np.array(list(scene.COLORS.values()), np.float32)
  targets = (colors - ground) @ _AXES.T  # [8, 3]
  # |pixels - a * alpha * target|^2 falls by a (2 match - a full). One product
  # per kind is too small for BLAS to use threads, which would only wait.
  match = (sprites @ pixels) @ targets.T  # [T, P, 8]
  full = energies[..., None] * (targets * targets).sum(1)
  amplitude = np.clip(match / full, *_AMPLITUDES)
  gain = amplitude * (2 * match - amplitude * full)
  best = np.unravel_index(np.argmax(gain), gain.shape)
  total = max(float((pixels * pixels).sum()), 1.0)
  if (
    gain[best] < _MIN_STRENGTH * full[best]
    or gain[best] < _MIN_EXPLAINED * total
  ):
    return None
  shape, size = _KINDS[best[0]]
  color = tuple(scene.COLORS)[best[2]]
  return scene.Object(shape, color, size, quadrant)


def _ground(window):
  """Returns the colour of the ground: the median of almost grey pixels."""
  blocks = window.reshape(_HALF, _HALF, 3)
  chroma = np.ptp(_blur(blocks), axis=-1)
  grey = blocks[chroma < _MAX_GROUND_CHROMA]
  if len(grey) < 30:  # too few grey pixels: take the least colourful
    order = np.argsort(chroma, axis=None)[:60]
    grey = blocks.reshape(-1, 3)[order]
  return np.median(grey, axis=0)


def _blur(window):
  """Returns means over 3 x 3 pixels; edges are repeated."""
  padded = np.pad(window, ((1, 1), (1, 1), (0, 0)), mode="edge")
  rows = padded[:-2] + padded[1:-1] + padded[2:]
  return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


@functools.cache
def _bank():
  """Returns sprites float32[T, P, 576] of T kinds at P positions, and their
  sums of squares [T, P].
  """
  steps = range(-_REACH, _REACH + 1)
  bank = np.stack(
    [
      [_sprite_at(*kind, dx, dy).ravel() for dy in steps for dx in steps]
      for kind in _KINDS
    ]
  )
  return bank, (bank * bank).sum(-1)


def _sprite_at(shape, size, dx, dy):
  """Returns a softened sprite (dx, dy) pixels off the centre of a quadrant."""
  extent = render.EXTENTS[size] * _HALF
  alpha = render.sprite(shape, extent, 0, 0)
  canvas = np.zeros((2 * _HALF, 2 * _HALF), np.float32)
  left = _HALF + dx - len(alpha) // 2
  top = _HALF + dy - len(alpha) // 2
  canvas[top : top + len(alpha), left : left + len(alpha)] = alpha
  soft = 0.5 * canvas + 0.5 * _blur(canvas[..., None])[..., 0]
  edge = _HALF // 2
  return soft[edge : edge + _HALF, edge : edge + _HALF]
