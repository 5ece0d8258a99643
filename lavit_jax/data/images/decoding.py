"""Decodes an image to the square that a network reads.

Two ways:

  exact   Pillow's decoder and its antialiased bicubic interpolation, as in
          LaVIT's preprocessing
  fast    JPEGs by simplejpeg, whose pixels are those of Pillow; one with sides
          of three times the square or more is decoded at a half, a quarter or
          an eighth of its size (scaled DCT); then SIMD bicubic interpolation
          (cykooz_resizer). Anything else is decoded as by the first.

How far the second is from the first, and how fast, benchmarks/decoders.py says.
"""

import functools
import importlib
import os
import struct
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from lavit_jax.core import errors, image_io
from lavit_jax.core.storage import files

# Takes an image as `image_io.load` does, the side of the square, and a name for
# messages; returns uint8[side, side, 3].
Decode = Callable[[Any, int, str | None], np.ndarray]
WAYS = ("exact", "fast")
_ENOUGH = 1.5  # times the square's side that is left of a large image
_SCALES = (8, 4, 2)
_ORIENTATION, _SHORT = 0x0112, 3  # of EXIF: a tag, and the type of its value
_MOST = 64 << 20  # bytes of a file that is decoded fast


def exact(source: Any, side: int, name: str | None = None) -> np.ndarray:
  """Returns the square of an image, decoded as LaVIT's preprocessing does.

  Args:
    source: as `image_io.load` takes it.
    side: of the square, in pixels; the image is resized to it without a crop.
    name: of the image in errors; by default its path.

  Returns:
    uint8[side, side, 3].

  Raises:
    image_io.ImageError: it is missing or cannot be decoded.
  """
  return image_io.to_uint8(image_io.load(source, name=name), side)


def fast(source: Any, side: int, name: str | None = None) -> np.ndarray:
  """Returns about the square that `exact` does, sooner.

  Args:
    source: as `image_io.load` takes it.
    side: of the square, in pixels.
    name: of the image in errors; by default its path.

  Returns:
    uint8[side, side, 3].

  Raises:
    image_io.ImageError: it is missing or cannot be decoded.
  """
  data = _bytes_of(source)
  if data is None:
    return exact(source, side, name)
  if not isinstance(source, bytes):
    name = name or os.fspath(source)
  if data[:3] == b"\xff\xd8\xff":
    square = _of_jpeg(data, side)
    if square is not None:
      return square
  return exact(data, side, name)


def way(name: str) -> Decode:
  """Returns one of the ways by its name.

  Raises:
    errors.ConfigError: there is no such way.
    errors.DataError: it needs libraries that are not installed.
  """
  if name not in WAYS:
    raise errors.ConfigError(
      f"config.data.decoding={name!r}: expected one of {', '.join(WAYS)}."
    )
  if name == "exact":
    return exact
  try:
    _libraries()
  except ImportError as error:
    raise errors.DataError(
      f"config.data.decoding='fast' needs {error.name}, which is not installed:"
      " pip install 'lavit_jax[fast]'"
    ) from error
  return fast


@functools.cache
def _libraries() -> tuple[Any, Any]:
  return (
    importlib.import_module("simplejpeg"),
    importlib.import_module("cykooz_resizer"),
  )


def _bytes_of(source) -> bytes | None:
  """Returns the bytes of an image; None if they are to be found otherwise."""
  if isinstance(source, bytes):
    return source
  if not isinstance(source, str | os.PathLike) or files.is_remote(source):
    return None
  try:
    with open(source, "rb") as file:
      size = os.fstat(file.fileno()).st_size
      return file.read(size) if 0 < size <= _MOST else None
  except (OSError, ValueError):
    return None  # the exact way says why


def _of_jpeg(data, side) -> np.ndarray | None:
  """Returns the square of a usual JPEG; None for one that is not."""
  simplejpeg, _ = _libraries()
  if not _is_plain(data):
    return None
  try:
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    usual = space in ("Gray", "YCbCr") and min(height, width) > 0
    small = height * width <= image_io.MAX_PIXELS
    thin = max(height, width) > image_io.MAX_ASPECT * min(height, width)
    if not usual or not small or thin:
      return None
    least = int(_ENOUGH * side)
    scale = next((s for s in _SCALES if min(height, width) >= s * least), 1)
    pixels = simplejpeg.decode_jpeg(
      data,
      colorspace="RGB",
      min_height=-(-height // scale) if scale > 1 else 0,
      min_width=-(-width // scale) if scale > 1 else 0,
      min_factor=1,
    )
  except ValueError:
    return None  # such as one that is cut off
  return resized(pixels, side)


def _is_plain(data) -> bool:
  """Whether a JPEG is surely upright as it is stored."""
  head = data[: 1 << 16]
  if b"tiff:Orientation" in head:
    return False  # in XMP, which Pillow heeds where EXIF says nothing
  start = head.find(b"Exif\0\0") + 6
  return start < 6 or _orientation(head[start:]) == 1


def _orientation(exif) -> int:
  """Returns the orientation in an EXIF block, 1 without one; 0 if unclear."""
  order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
  if order is None:
    return 0
  try:
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
      tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, entry)
      if tag == _ORIENTATION:
        return value if kind == _SHORT else 0
  except struct.error:
    return 0
  return 1


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
  """Returns uint8[H, W, 3] as uint8[side, side, 3], by bicubic interpolation.

  Antialiased, as Pillow's; values differ where these round otherwise.
  """
  height, width, _ = pixels.shape
  if (height, width) == (side, side):
    return pixels
  _, library = _libraries()
  kind = library.PixelType.U8x3
  source = library.ImageData(width, height, kind, pixels.tobytes())
  target = library.ImageData(side, side, kind)
  resizer, options = _resizer()
  resizer.resize(source, target, options)
  return np.frombuffer(target.get_buffer(), np.uint8).reshape(side, side, 3)


def _resizer() -> tuple[Any, Any]:
  """Returns the resizer of this thread, and what it does."""
  if not hasattr(_OF_THREAD, "resizer"):
    _, library = _libraries()
    bicubic = library.ResizeAlg.convolution(library.FilterType.catmull_rom)
    _OF_THREAD.resizer = library.Resizer()
    _OF_THREAD.options = library.ResizeOptions(resize_alg=bicubic)
  return _OF_THREAD.resizer, _OF_THREAD.options


_OF_THREAD = threading.local()
