"""Reads images exactly as the official detokenizer does.

`LaVITDetokenizer` of jy0205/LaVIT (commit 8cde9b4) reads images as
`official.preprocess` does not: they are scaled by bicubic interpolation
without antialiasing, whatever their sides, and neither cropped nor rounded.
"""

import numpy as np

from lavit_jax.core import image_io

_SHARP = -0.75  # PyTorch's `a` of the cubic convolution


def clip_pixels(images: np.ndarray, size: int) -> np.ndarray:
  """Prepares images for the encoder as the official detokenizer does.

  Args:
    images: float[B, H, W, 3] in [0, 1].
    size: S, pixels a side.

  Returns:
    float32[B, S, S, 3], CLIP-normalised; bicubic overshoots are kept.
  """
  return image_io.normalize(bicubic(images, (size, size)))


def bicubic(images: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
  """Scales images as torch's F.interpolate(mode="bicubic"), not antialiased.

  Args:
    images: float[B, H, W, C].
    sides: H' and W', the new height and width.

  Returns:
    float32[B, H', W', C].
  """
  rows, columns = (
    _weights(before, after)
    for before, after in zip(images.shape[1:3], sides, strict=True)
  )
  scaled = np.einsum("ih,bhwc,jw->bijc", rows, images, columns, optimize=True)
  return scaled.astype(np.float32)


def _weights(before: int, after: int) -> np.ndarray:
  """Returns the weight of each old pixel in each new: float64[after, before].

  Pixels at the edges are repeated.
  """
  position = (np.arange(after) + 0.5) * before / after - 0.5
  first = np.floor(position).astype(int)
  table = np.zeros((after, before))
  for offset in range(-1, 3):
    source = np.clip(first + offset, 0, before - 1)
    distance = np.abs(position - first - offset)
    np.add.at(table, (np.arange(after), source), _cubic(distance))
  return table


def _cubic(x: np.ndarray) -> np.ndarray:
  """Evaluates the cubic convolution kernel (Keys, 1981) at 0 <= x <= 2."""
  near = ((_SHARP + 2) * x - (_SHARP + 3)) * x * x + 1
  far = _SHARP * (((x - 5) * x + 8) * x - 4)
  return np.where(x <= 1, near, far)
