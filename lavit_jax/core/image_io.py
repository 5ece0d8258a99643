"""Decodes and preprocesses images; no other file does.

`load` converts the images of users and datasets (path, bytes, PIL image,
array) to upright RGB images. `to_uint8` resizes them to squares for the data
pipeline, and `normalize` prepares these for the encoder.
"""

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import (
  ExifTags,
  Image,
  ImageOps,
  TiffImagePlugin,
  UnidentifiedImageError,
)

from lavit_jax.core import errors
from lavit_jax.core.storage import files

# CLIP's statistics, used by EVA-CLIP and hence by LaVIT (paper, appendix A).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

MAX_PIXELS = 50_000_000  # 150 MB as RGB; Pillow itself warns at 89 M only
MAX_ASPECT = 100  # longer strips show nothing once resized to a square
_WHITE = (255, 255, 255, 255)
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")


class ImageError(errors.LavitError):
  """An image cannot be used; the message names it and gives the reason."""


def load(
  source: Any,
  *,
  name: str | None = None,
  max_pixels: int = MAX_PIXELS,
  plain: bool = False,
) -> Image.Image:
  """Decodes one image to an upright RGB PIL image.

  EXIF orientation is applied. Transparency is composited over white. CMYK,
  palette, grey, 1-bit and 16-bit images become 8-bit RGB; of several frames
  the first is used. The format is told by the content, not by the file name.

  Args:
    source: a path, encoded bytes, a PIL image, or an array uint8[H, W],
      uint8[H, W, 1|3|4] or float[H, W, 1|3|4] in [0, 1].
    name: of the image in errors; by default the path.
    max_pixels: larger images are refused before they are decoded.
    plain: only apply Pillow's convert("RGB"), as the official code does: the
      orientation is ignored, and transparent pixels keep their stored colour.

  Returns:
    PIL image of mode RGB.

  Raises:
    ImageError: missing, unreadable, truncated, too large or too thin.
  """
  name = name or _name(source)
  if isinstance(source, (str, os.PathLike)):
    return _from_path(source, name, max_pixels, plain)
  if isinstance(source, (bytes, bytearray, memoryview)):
    return _decode(io.BytesIO(source), name, max_pixels, plain)
  if isinstance(source, Image.Image):
    return _finish(source, name, max_pixels, plain)
  if hasattr(source, "__array__"):
    image = _from_array(np.asarray(source), name)
    return _finish(image, name, max_pixels, plain)
  raise ImageError(
    f"{name}: cannot make an image of {type(source).__name__}; give a path,"
    " encoded bytes, a PIL image or an array."
  )


def size_of(
  source: Any, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
  """Returns the size that `load` would give, from the header only.

  Args:
    source: as of `load`.
    name: of the image in errors; by default the path.
    max_pixels: larger images are refused.

  Returns:
    (height, width) of the upright image. Damage after the header is not
    detected.

  Raises:
    ImageError: missing, not an image, too large or too thin.
  """
  name = name or _name(source)
  encoded = isinstance(source, (bytes, bytearray, memoryview))
  if not encoded and not isinstance(source, (str, os.PathLike)):
    width, height = load(source, name=name, max_pixels=max_pixels).size
    return height, width
  try:
    if not encoded and files.is_remote(source):
      source, encoded = files.input_path(source).read_bytes(), True
    with Image.open(io.BytesIO(source) if encoded else source) as image:
      _check_size(image.size, name, max_pixels)
      width, height = _stored_size(image)
      transposed = _orientation(image) in _TRANSPOSED
  except ImageError:
    raise
  except Exception as error:  # Pillow's plugins raise errors of any class
    reason = " ".join(str(error).split()) or type(error).__name__
    raise ImageError(
      f"{name}: cannot be read as an image ({reason[:200]}); replace or remove"
      " it."
    ) from error
  return (width, height) if transposed else (height, width)


def _stored_size(image):
  """Returns width and height as stored, before any rotation.

  For a TIFF, Pillow returns the upright size since version 11, and still the
  orientation. Its tags are the same in all versions.
  """
  if image.format != "TIFF":
    return image.size
  names = (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH)
  return tuple(int(image.tag_v2[name]) for name in names)


def _orientation(image):
  """Returns the EXIF orientation; 1 (upright) if it is missing or broken."""
  try:
    return image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # `load` does not rotate such an image either
    return 1


def to_uint8(image: Image.Image, size: int) -> np.ndarray:
  """Resizes an RGB image to uint8[size, size, 3], without a crop.

  Pillow's antialiased bicubic interpolation, as in LaVIT's preprocessing.
  """
  if image.size != (size, size):
    image = image.resize((size, size), Image.Resampling.BICUBIC)
  return np.array(image, np.uint8)


def cut(
  image: Image.Image,
  box: tuple[float, float, float, float],
  size: Sequence[int],
) -> np.ndarray:
  """Crops an RGB image and resizes the crop to uint8[height, width, 3].

  Args:
    image: a PIL image.
    box: left, top, right, bottom in pixels, integers or not.
    size: height and width.
  """
  height, width = size
  bicubic = Image.Resampling.BICUBIC
  return np.array(image.resize((width, height), bicubic, box=box), np.uint8)


def normalize(pixels: Any) -> Any:
  """Maps uint8[..., 3] or float[..., 3] in [0, 1] to CLIP's float32[..., 3].

  NumPy arrays give NumPy arrays, JAX arrays JAX arrays.
  """
  scale = 255.0 if np.issubdtype(pixels.dtype, np.integer) else 1.0
  return (pixels.astype(np.float32) / np.float32(scale) - MEAN) / STD


def to_pil(pixels: Any) -> Image.Image:
  """Converts float[H, W, 3], clipped to [0, 1], or uint8[H, W, 3] to PIL.

  Raises:
    ImageError: another shape, NaN or infinite pixels.
  """
  pixels = np.asarray(pixels)
  if pixels.ndim != 3 or pixels.shape[-1] != 3:
    raise ImageError(f"to_pil takes [H, W, 3], got shape {pixels.shape}.")
  if pixels.dtype != np.uint8:
    if not np.isfinite(pixels).all():
      raise ImageError("to_pil got NaN or infinite pixels.")
    scaled = pixels.astype(np.float32).clip(0, 1) * 255
    pixels = scaled.round().astype(np.uint8)
  return Image.fromarray(pixels, "RGB")


def _name(source):
  """Returns the name of `source` for error messages."""
  if isinstance(source, (str, os.PathLike)):
    return str(source)
  if isinstance(source, (bytes, bytearray, memoryview)):
    return f"<{len(source)} bytes>"
  if isinstance(source, Image.Image):
    return getattr(source, "filename", "") or "<PIL image>"
  if hasattr(source, "shape"):
    return f"<array {source.shape}>"
  return f"<{type(source).__name__}>"


def _from_path(path, name, max_pixels, plain):
  """Decodes a file; errors tell a missing file from one without an image."""
  if os.fspath(path).startswith(("http:/", "https:/")):
    raise ImageError(f"{name}: is a web address; download the image first.")
  try:
    path = files.input_path(path)
    if path.is_dir():
      raise ImageError(f"{name}: is a folder, not an image.")
    with path.open("rb") as file:
      return _decode(file, name, max_pixels, plain)
  except FileNotFoundError:
    raise ImageError(f"{name}: no such file; check the path.") from None
  except (OSError, ValueError) as error:  # ValueError: a null byte in a path
    if isinstance(error, ImageError):
      raise
    raise ImageError(f"{name}: cannot be read ({error}).") from error


def _decode(file, name, max_pixels, plain):
  """Decodes an open file; its size is checked before pixels are decoded."""
  try:
    with Image.open(file) as image:
      _check_size(image.size, name, max_pixels)
      image.load()
      return _finish(image, name, max_pixels, plain)
  except ImageError:
    raise
  except UnidentifiedImageError as error:
    raise ImageError(
      f"{name}: is no image of a known format (it may be empty, damaged, or not"
      " an image); replace or remove it."
    ) from error
  except Exception as error:  # Pillow's plugins raise errors of any class
    reason = " ".join(str(error).split()) or type(error).__name__
    raise ImageError(
      f"{name}: cannot be decoded ({reason[:200]}); replace or remove it."
    ) from error


def _check_size(size, name, max_pixels):
  """Refuses empty, huge and extremely thin images."""
  width, height = size
  if width < 1 or height < 1:
    raise ImageError(f"{name}: has no pixels ({width}x{height}).")
  if width * height > max_pixels:
    raise ImageError(
      f"{name}: {width}x{height} is {width * height:,} pixels, more than"
      f" the limit of {max_pixels:,}; make it smaller (max_pixels=)."
    )
  if max(size) > MAX_ASPECT * min(size):
    raise ImageError(
      f"{name}: {width}x{height} is thinner than 1:{MAX_ASPECT}; resized to a"
      " square it would show nothing. Crop it."
    )


def _finish(image, name, max_pixels, plain):
  """Converts an image to upright, opaque, 8-bit RGB."""
  _check_size(image.size, name, max_pixels)
  try:
    image.load()
    if plain:
      return image.convert("RGB")
    return _to_rgb(_upright(image), name)
  except OSError as error:  # a lazily opened PIL image may be truncated
    raise ImageError(f"{name}: cannot be decoded ({error}).") from error


def _upright(image):
  """Applies the EXIF orientation; a broken EXIF block is ignored."""
  try:
    return ImageOps.exif_transpose(image)
  except Exception:  # the pixels are good, only the metadata are not
    return image


def _to_rgb(image, name):
  """Converts an image of any Pillow mode to RGB, over white."""
  if image.mode == "F":
    raise ImageError(
      f"{name}: holds floating point pixels, whose range is unknown; save it"
      " with 8 or 16 bits."
    )
  if image.mode in _SIXTEEN_BIT:
    return _from_sixteen_bit(image)
  if "A" in image.getbands() or "transparency" in image.info:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(
      Image.new("RGBA", rgba.size, _WHITE), rgba
    ).convert("RGB")
  return image.convert("RGB")


def _from_sixteen_bit(image):
  """Scales 16-bit grey to 8 bits (v / 257); transparent pixels become white."""
  values = np.asarray(image).astype(np.int64)
  grey = ((values.clip(0, 65535) + 128) // 257).astype(np.uint8)
  if isinstance(transparent := image.info.get("transparency"), int):
    grey[values == transparent] = 255
  return Image.fromarray(grey, "L").convert("RGB")


def _from_array(array, name):
  """Converts an array uint8 or float [H, W] or [H, W, 1|3|4] to PIL."""
  if array.ndim == 3 and array.shape[-1] == 1:
    array = array[..., 0]
  if array.ndim != 2 and (array.ndim != 3 or array.shape[-1] not in (3, 4)):
    raise ImageError(
      f"{name}: an array image is [H, W], [H, W, 1], [H, W, 3] or"
      f" [H, W, 4], got {array.shape}."
    )
  if not array.size:
    raise ImageError(f"{name}: has no pixels.")
  if np.issubdtype(array.dtype, np.floating):
    if not (np.isfinite(array).all() and 0 <= array.min() <= array.max() <= 1):
      raise ImageError(f"{name}: float pixels must lie in [0, 1].")
    array = (array.astype(np.float32) * 255).round().astype(np.uint8)
  if array.dtype == bool:
    array = array.astype(np.uint8) * 255
  if array.dtype != np.uint8:
    raise ImageError(
      f"{name}: pixels are {array.dtype}; give uint8, or floats in [0, 1]."
    )
  return Image.fromarray(np.ascontiguousarray(array))
