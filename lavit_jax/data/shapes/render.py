"""Draws scenes of the shapes world: numpy only, about 0.1 ms an image.

Objects are pasted from small antialiased sprites (8 x 8 samples a pixel, at a
quarter-pixel position) that each process draws once and keeps.
"""

import functools
import math

import numpy as np

from lavit_jax.data.shapes import scene as scene_lib

MIN_IMAGE_SIZE = 32
MAX_IMAGE_SIZE = 64
# Extent of an object as a share of its quadrant (24 px of a 48 px image).
EXTENTS = {"large": 20 / 24, "small": 12.5 / 24}
_SAMPLES = 8  # a pixel side
_STEPS = 4  # sprite positions a pixel side
# Outlines are scaled so that no shape looks much smaller than the others.
_SCALES = {"square": 0.9, "diamond": 1.08}


def check_image_size(image_size: int) -> None:
  """Raises ValueError unless `image_size` is even and in 32..64."""
  if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE or image_size % 2:
    raise ValueError(
      f"image_size={image_size} does not suit the shapes world; expected an"
      f" even number from {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}."
      " Change data.image_size."
    )


def render(scene: scene_lib.Scene, image_size: int = 48) -> np.ndarray:
  """Draws a Scene, uint8[image_size, image_size, 3]."""
  check_image_size(image_size)
  image = _ground(scene.background, image_size)
  for obj in scene.objects:
    color = np.asarray(scene_lib.COLORS[obj.color], np.float32)
    region, alpha = _place(obj, scene.jitter, image_size)
    patch = image[region]
    patch += alpha[..., None] * (color - patch)
  return np.rint(image).astype(np.uint8)


def coverage(scene: scene_lib.Scene, image_size: int = 48) -> np.ndarray:
  """Returns the share of each pixel that objects cover, float32[H, W]."""
  check_image_size(image_size)
  covered = np.zeros((image_size, image_size), np.float32)
  for obj in scene.objects:
    region, alpha = _place(obj, scene.jitter, image_size)
    covered[region] = np.maximum(covered[region], alpha)
  return covered


def object_mask(scene: scene_lib.Scene, image_size: int = 48) -> np.ndarray:
  """Returns which pixels objects cover by half or more, bool[H, W]."""
  return coverage(scene, image_size) >= 0.5


def object_shares(
  scene: scene_lib.Scene, image_size: int = 48, patch_size: int = 8
) -> np.ndarray:
  """Returns the share of object pixels in each patch, float32[N].

  Patches are in raster order.

  Raises:
    ValueError: patches of this size do not tile the image.
  """
  if patch_size <= 0 or image_size % patch_size:
    raise ValueError(
      f"patch_size={patch_size} does not divide image_size={image_size}:"
      " patches must tile the image. Change one of the two."
    )
  side = image_size // patch_size
  mask = object_mask(scene, image_size).astype(np.float32)
  blocks = mask.reshape(side, patch_size, side, patch_size)
  return blocks.mean((1, 3)).reshape(side * side)


def _place(obj, jitter, image_size):
  """Returns (slices of the image, float32 alpha) to paste an object."""
  index = scene_lib.PLACES.index(obj.place)
  dx, dy = jitter[index]
  half = image_size / 2
  unit = image_size / 48 / 4  # jitter is in quarter pixels at 48 px
  x = (index % 2 + 0.5) * half + dx * unit
  y = (index // 2 + 0.5) * half + dy * unit
  kx, ky = round(x * _STEPS), round(y * _STEPS)
  extent = round(EXTENTS[obj.size] * half * 16) / 16
  alpha = sprite(obj.shape, extent, kx % _STEPS, ky % _STEPS)
  reach = alpha.shape[0] // 2
  left, top = kx // _STEPS - reach, ky // _STEPS - reach
  x0, x1 = max(left, 0), min(left + len(alpha), image_size)
  y0, y1 = max(top, 0), min(top + len(alpha), image_size)
  region = (slice(y0, y1), slice(x0, x1))
  return region, alpha[y0 - top : y1 - top, x0 - left : x1 - left]


@functools.lru_cache(maxsize=4096)
def sprite(shape: str, extent: float, step_x: int, step_y: int) -> np.ndarray:
  """Returns the alpha of a shape, float32[P, P], read-only; P is even.

  Args:
    shape: one of scene.SHAPES.
    extent: width of the shape in pixels.
    step_x: quarter pixels from the left corner of pixel [P // 2, P // 2] to
      the centre of the shape.
    step_y: quarter pixels from its upper corner.
  """
  reach = math.ceil(extent * max(_SCALES.values()) / 2) + 1
  side = 2 * reach
  ticks = (np.arange(side * _SAMPLES) + 0.5) / _SAMPLES - reach
  scale = extent * _SCALES.get(shape, 1.0) / 2
  x = (ticks - step_x / _STEPS)[None, :] / scale
  y = (ticks - step_y / _STEPS)[:, None] / scale
  inside = _inside(shape, x, y).astype(np.float32)
  alpha = inside.reshape(side, _SAMPLES, side, _SAMPLES).mean((1, 3))
  alpha.setflags(write=False)
  return alpha


def _inside(shape, x, y):
  """Whether points of the square [-1, 1]^2, y down, are inside a shape."""
  ax, ay = np.abs(x), np.abs(y)
  if shape == "circle":
    return x * x + y * y <= 1
  if shape == "square":
    return np.maximum(ax, ay) <= 1
  if shape == "triangle":
    return (np.abs(y) <= 0.95) & (ax <= (y + 0.95) / 1.9)
  if shape == "diamond":
    return ax + ay <= 1
  if shape == "cross":
    return (np.maximum(ax, ay) <= 1) & (np.minimum(ax, ay) <= 0.34)
  if shape == "ring":
    radius = x * x + y * y
    return (radius <= 1) & (radius >= 0.54**2)
  raise ValueError(
    f"shape={shape!r} cannot be drawn; expected one of"
    f" {', '.join(scene_lib.SHAPES)}."
  )


@functools.lru_cache(maxsize=16)
def _grid(image_size):
  """Returns pixel centres in pixels of a 48 px image, float32[1, W], [H, 1]."""
  ticks = (np.arange(image_size, dtype=np.float32) + 0.5) * (48 / image_size)
  return ticks[None, :] - 24, ticks[:, None] - 24


def _ground(background, image_size):
  """Draws the background, float32[H, W, 3]."""
  image = np.empty((image_size, image_size, 3), np.float32)
  image[:] = background.base
  if background.kind == "plain":
    return image
  x, y = _grid(image_size)
  u = math.cos(background.angle) * x + math.sin(background.angle) * y
  if background.kind == "gradient":
    field = u / 24
  elif background.kind == "waves":
    field = np.sin(2 * np.pi * (u / background.period + background.phase))
  elif background.kind == "checks":
    shift = background.phase * background.period
    columns = np.floor((x + shift) / (background.period / 2)) % 2
    rows = np.floor((y + shift) / (background.period / 2)) % 2
    field = 1 - 2 * np.abs(columns - rows)
  else:
    raise ValueError(
      f"background kind={background.kind!r} cannot be drawn; expected one"
      f" of {', '.join(scene_lib.BACKGROUNDS)}."
    )
  image += background.amplitude * field[..., None]
  return image
