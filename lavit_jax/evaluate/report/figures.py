"""Figures of a model's work: kept patches, contact sheets, codebooks.

Images are uint8[H, W, 3] arrays or PIL images; every function returns an RGB
PIL image on white. Small images are enlarged without smoothing, so that their
pixels stay visible.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ImageLike = Image.Image | np.ndarray

_INK = (40, 44, 52)
_FAINT = (120, 126, 138)
_ACCENT = (255, 138, 0)
_PAPER = (255, 255, 255)
_GAP = 8
_SMALL = 128  # px; below it an image is enlarged pixel by pixel


def to_pil(image: ImageLike) -> Image.Image:
  """Converts uint8[H, W, 3], uint8[H, W] or a PIL image to an RGB PIL image.

  Raises:
    ValueError: an array of another dtype or shape.
  """
  if isinstance(image, Image.Image):
    return image.convert("RGB")
  array = np.asarray(image)
  grey = array.ndim == 2
  if array.dtype != np.uint8 or not (grey or array.shape[2:] == (3,)):
    raise ValueError(
      f"An image is {array.dtype}{list(array.shape)}; figures take"
      " uint8[H, W, 3], uint8[H, W] or a PIL image. Convert it first."
    )
  return Image.fromarray(array).convert("RGB")


def fit(image: ImageLike, size: int) -> Image.Image:
  """Scales an image to a longer side of `size` pixels."""
  image = to_pil(image)
  scale = size / max(image.size)
  small = max(image.size) < _SMALL and scale > 1
  filter_ = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
  width, height = (max(1, round(side * scale)) for side in image.size)
  return image.resize((width, height), filter_)


def overlay_mask(
  image: ImageLike,
  keep: np.ndarray,
  *,
  size: int = 240,
  grid: tuple[int, int] | None = None,
) -> Image.Image:
  """Shows kept patches bright and framed, dropped patches faded and grey.

  Args:
    image: the image that was tokenized.
    keep: bool[N], patches in raster order.
    size: longer side of the result in pixels.
    grid: rows and columns of patches; None: a square.

  Raises:
    ValueError: N is not rows x columns.
  """
  keep = np.asarray(keep).astype(bool).reshape(-1)
  side = math.isqrt(keep.size)
  rows, columns = grid or (side, side)
  if rows * columns != keep.size:
    raise ValueError(
      f"A mask of {keep.size} patches does not fill {rows} x {columns}. Give"
      " grid=(rows, columns) for an image that is not square."
    )
  keep = keep.reshape(rows, columns)
  bright = fit(image, size)
  width, height = bright.size
  x = np.arange(width) * columns // width  # column of each pixel
  y = np.arange(height) * rows // height
  faded = np.asarray(bright.convert("L"), np.float32)[..., None] * 0.22 + 186
  shown = keep[y[:, None], x[None, :]][..., None]  # [height, width, 1]
  pixels = np.where(shown, np.asarray(bright), faded.astype(np.uint8))
  result = Image.fromarray(pixels.astype(np.uint8))
  _draw_grid(result, keep)
  return result


def _draw_grid(image: Image.Image, keep: np.ndarray) -> None:
  """Draws faint lines between patches, strong ones around kept patches."""
  draw = ImageDraw.Draw(image, "RGBA")
  rows, columns = keep.shape
  xs = [-(-i * image.width // columns) for i in range(columns + 1)]
  ys = [-(-i * image.height // rows) for i in range(rows + 1)]
  for x in xs[1:-1]:
    draw.line([(x, 0), (x, image.height)], fill=(255, 255, 255, 70))
  for y in ys[1:-1]:
    draw.line([(0, y), (image.width, y)], fill=(255, 255, 255, 70))
  padded = np.pad(keep, 1)
  for r, c in np.argwhere(keep):
    box = (xs[c], ys[r], xs[c + 1] - 1, ys[r + 1] - 1)
    left, top, right, bottom = box
    for out, line in (
      (padded[r, c + 1], (left, top, right, top)),
      (padded[r + 2, c + 1], (left, bottom, right, bottom)),
      (padded[r + 1, c], (left, top, left, bottom)),
      (padded[r + 1, c + 2], (right, top, right, bottom)),
    ):
      if not out:
        draw.line(line, fill=(*_ACCENT, 255), width=2)


def contact_sheet(
  images: Sequence[ImageLike],
  labels: Sequence[str] | None = None,
  *,
  columns: int | None = None,
  cell: int = 144,
) -> Image.Image:
  """Arranges images in rows, each with its wrapped label below.

  Args:
    images: at least one image; shapes may differ.
    labels: a text for each image, or None.
    columns: images per row; None: at most six.
    cell: longer side of an image in pixels.

  Raises:
    ValueError: there are no images, or not as many labels as images.
  """
  if not images or (labels is not None and len(labels) != len(images)):
    count = "no" if labels is None else str(len(labels))
    raise ValueError(
      f"A contact sheet of {len(images)} images with {count} labels: give at"
      " least one image, and a label for each image or none."
    )
  columns = columns or min(len(images), 6)
  font_size = max(11, cell // 12)
  font = ImageFont.load_default(size=font_size)
  texts = _wrapped(labels or [""] * len(images), cell, font_size)
  firsts = range(0, len(images), columns)
  heights = [
    cell + _GAP + round(1.3 * font_size) * max(map(len, texts[i : i + columns]))
    for i in firsts
  ]
  size = (columns * (cell + _GAP) + _GAP, sum(heights) + _GAP)
  sheet = Image.new("RGB", size, _PAPER)
  draw = ImageDraw.Draw(sheet)
  for i, image in enumerate(images):
    row, column = divmod(i, columns)
    left, top = _GAP + column * (cell + _GAP), _GAP + sum(heights[:row])
    image = fit(image, cell)
    inset = (cell - image.width) // 2, (cell - image.height) // 2
    sheet.paste(image, (left + inset[0], top + inset[1]))
    position, text = (left, top + cell + 2), "\n".join(texts[i])
    draw.multiline_text(position, text, fill=_INK, font=font, spacing=2)
  return sheet


def _wrapped(
  labels: Sequence[str], width: int, font_size: int
) -> list[list[str]]:
  """Returns the lines of each label, wrapped to about `width` pixels."""
  characters = max(8, int(width / (font_size * 0.52)))
  return [textwrap.wrap(label, characters) for label in labels]


def codebook_sheet(
  examples: Mapping[int, Sequence[ImageLike]],
  *,
  shown: int = 8,
  columns: int = 4,
  cell: int = 28,
) -> Image.Image:
  """Shows each code with patches that were quantized to it.

  Args:
    examples: images of patches by code, in the order to show them.
    shown: patches per code; missing ones are left blank.
    columns: codes per row.
    cell: side of a patch in pixels.

  Raises:
    ValueError: there are no codes.
  """
  if not examples:
    raise ValueError(
      "A codebook sheet of no codes: give patches for at least one code."
    )
  font = ImageFont.load_default(size=11)
  label = 40
  width, height = label + shown * (cell + 1) + 2 * _GAP, cell + 5
  rows = -(-len(examples) // columns)
  size = (columns * width + _GAP, rows * height + _GAP)
  sheet = Image.new("RGB", size, _PAPER)
  draw = ImageDraw.Draw(sheet)
  for i, (code, patches) in enumerate(examples.items()):
    # Down the columns, so that neighbours in the mapping stay neighbours.
    left = _GAP + (i // rows) * width
    top = _GAP + (i % rows) * height
    position = (left + label - 6, top + cell // 2)
    draw.text(position, str(code), fill=_FAINT, font=font, anchor="rm")
    for j, patch in enumerate(patches[:shown]):
      image = to_pil(patch).resize((cell, cell), Image.Resampling.NEAREST)
      sheet.paste(image, (left + label + j * (cell + 1), top))
  return sheet
