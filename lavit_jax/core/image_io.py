"""The one place that decodes and preprocesses images.

`load` turns whatever a user or a dataset holds (path, bytes, PIL image, array)
into an upright RGB image; `to_uint8` gives the square the data pipeline
carries; `normalize` is the model's door.
"""

import io
import os

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

MAX_PIXELS = 50_000_000  # 150 MB as RGB; Pillow itself only warns at 89 M.
MAX_ASPECT = 100  # a longer strip squashed to a square shows nothing
_WHITE = (255, 255, 255, 255)
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")


class ImageError(errors.LavitError):
  """An image that cannot be used; the message names it and says why."""


def load(source, *, name=None, max_pixels=MAX_PIXELS, plain=False):
  """Decodes one image to an upright RGB PIL image.

  EXIF orientation is applied, transparency is laid over white, CMYK, palette,
  grey, 1-bit and 16-bit images become 8-bit RGB, of several frames the
  first is taken. Files go by content, not by their ending.

  Args:
    source: a path, encoded bytes, a PIL image, or an array uint8[H, W],
      uint8[H, W, 1|3|4] or float[H, W, 1|3|4] in [0, 1].
    name: what to call the image in errors; by default the path.
    max_pixels: larger images are refused before they are decoded.
    plain: leave it to Pillow's convert("RGB") alone, as the official code
      does: no orientation, and under transparency whatever colour is stored.

  Returns:
    PIL image of mode RGB.

  Raises:
    ImageError: missing, unreadable, cut off, too large or too thin.
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


def size_of(source, *, name=None, max_pixels=MAX_PIXELS):
  """Height and width that `load` would give, told by the header alone.

  Args:
    source: what `load` takes.
    name: what to call the image in errors; by default the path.
    max_pixels: larger images are refused.

  Returns:
    (height, width) of the upright image. Damage beyond the header goes
    unseen.

  Raises:
    ImageError: missing, no image, too large or too thin.
  """
  name = name or _name(source)
  encoded = isinstance(source, (bytes, bytearray, memoryview))
  if not encoded and not isinstance(source, (str, os.PathLike)):
    width, height = load(source, name=name, max_pixels=max_pixels).size
    return height, width
  try:
    if not encoded and files.is_remote(source):
      source, encoded = files.place(source).read_bytes(), True
    with Image.open(io.BytesIO(source) if encoded else source) as image:
      _check_size(image.size, name, max_pixels)
      width, height = _stored_size(image)
      turned = _orientation(image) in _TURNED
  except ImageError:
    raise
  except Exception as error:  # Pillow's plugins raise whatever they like
    reason = " ".join(str(error).split()) or type(error).__name__
    raise ImageError(
      f"{name}: cannot be read as an image ({reason[:200]}); replace or remove"
      " it."
    ) from error
  return (width, height) if turned else (height, width)


def _stored_size(image):
  """Width and height as they are stored, before any turn.

  Of a TIFF Pillow tells the upright ones since version 11, and still has the
  orientation: its tags say what no version changes.
  """
  if image.format != "TIFF":
    return image.size
  names = (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH)
  return tuple(int(image.tag_v2[name]) for name in names)


def _orientation(image):
  """The EXIF orientation, 1 (upright) where there is none or a broken one."""
  try:
    return image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # as `load`, which leaves such an image as it is
    return 1


def to_uint8(image, size):
  """Resizes an RGB image straight to uint8[size, size, 3] (no crop).

  Pillow's antialiased bicubic, as LaVIT's own preprocessing does.
  """
  if image.size != (size, size):
    image = image.resize((size, size), Image.Resampling.BICUBIC)
  return np.array(image, np.uint8)


def cut(image, box, size):
  """Scales a part of an RGB image to uint8[height, width, 3].

  Args:
    image: a PIL image.
    box: left, top, right, bottom in its pixels, whole or not.
    size: height and width.

  The whole as a square is `to_uint8`.
  """
  bicubic = Image.Resampling.BICUBIC
  return np.array(image.resize(size[::-1], bicubic, box=box), np.uint8)


def normalize(pixels):
  """Maps uint8[..., 3] or float[..., 3] in [0, 1] to CLIP's float32[..., 3].

  Works on NumPy and on JAX arrays, and returns the same kind.
  """
  scale = 255.0 if np.issubdtype(pixels.dtype, np.integer) else 1.0
  return (pixels.astype(np.float32) / np.float32(scale) - MEAN) / STD


def preprocess(source, size, **kwargs):
  """Loads one image as CLIP-normalised float32[size, size, 3]."""
  return normalize(to_uint8(load(source, **kwargs), size))


def to_pil(pixels):
  """Turns float[H, W, 3] in [0, 1] (clipped) or uint8[H, W, 3] into a PIL."""
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
  """What to call `source` in an error message."""
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
  """Opens a file, telling a missing one from one that is no image."""
  if os.fspath(path).startswith(("http:/", "https:/")):
    raise ImageError(f"{name}: is a web address; download the image first.")
  try:
    path = files.place(path)
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
  """Decodes an open file; size is checked before any pixel is unpacked."""
  try:
    with Image.open(file) as image:
      _check_size(image.size, name, max_pixels)
      image.load()
      return _finish(image, name, max_pixels, plain)
  except ImageError:
    raise
  except UnidentifiedImageError as error:
    raise ImageError(
      f"{name}: is no image of a known format (empty, damaged or something"
      " else under an image's name); replace or remove it."
    ) from error
  except Exception as error:  # Pillow's plugins raise whatever they like
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
      f"{name}: {width}x{height} is thinner than 1:{MAX_ASPECT}; squashed to"
      " a square nothing could be seen. Crop it."
    )


def _finish(image, name, max_pixels, plain):
  """Upright, opaque, 8-bit RGB."""
  _check_size(image.size, name, max_pixels)
  try:
    image.load()
    if plain:
      return image.convert("RGB")
    return _to_rgb(_upright(image), name)
  except OSError as error:  # a lazily opened PIL image may be cut off
    raise ImageError(f"{name}: cannot be decoded ({error}).") from error


def _upright(image):
  """Applies the EXIF orientation; a broken EXIF block is ignored."""
  try:
    return ImageOps.exif_transpose(image)
  except Exception:  # the pixels are good, only the side information is not
    return image


def _to_rgb(image, name):
  """Converts any Pillow mode to RGB over white."""
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
  """Scales 16-bit grey to 8 bit (v / 257); its transparent value is white."""
  values = np.asarray(image).astype(np.int64)
  grey = ((values.clip(0, 65535) + 128) // 257).astype(np.uint8)
  if isinstance(hidden := image.info.get("transparency"), int):
    grey[values == hidden] = 255
  return Image.fromarray(grey, "L").convert("RGB")


def _from_array(array, name):
  """Makes a PIL image of uint8 or float [H, W] or [H, W, 1|3|4]."""
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
