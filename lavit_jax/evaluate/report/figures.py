"""Images of what a model sees and makes: masks, sheets, codebooks.

Images are uint8[H, W, 3] arrays or PIL images; every function returns a PIL
image in RGB on white. Small images are enlarged without smoothing, so that
their own pixels stay visible.
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
  """A PIL image in RGB of uint8[H, W, 3], uint8[H, W] or a PIL image.

  Raises:
    ValueError: for an array of another dtype or shape.
  """
  if isinstance(image, Image.Image):
    return image.convert("RGB")
  array = np.asarray(image)
  grey = array.ndim == 2
  if array.dtype != np.uint8 or not (grey or array.shape[2:] == (3,)):
    raise ValueError(
      f"an image is {array.dtype}{list(array.shape)}; figures take"
      " uint8[H, W, 3] (or uint8[H, W], or a PIL image)."
    )
  return Image.fromarray(array).convert("RGB")


def fit(image: ImageLike, size: int) -> Image.Image:
  """The image with its longer side `size`, shape kept."""
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
  """Shows kept patches bright and framed, dropped ones faded and grey.

  Args:
    image: the image that was tokenized.
    keep: bool[N], patches in raster order.
    size: longer side of the result in pixels.
    grid: rows and columns of patches; a square is taken when not given.

  Raises:
    ValueError: N is not rows x columns.
  """
  keep = np.asarray(keep).astype(bool).reshape(-1)
  side = math.isqrt(keep.size)
  rows, columns = grid or (side, side)
  if rows * columns != keep.size:
    raise ValueError(
      f"a keep mask of {keep.size} patches does not fill {rows} x {columns};"
      " pass grid=(rows, columns) for an image that is not square."
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
  """Faint lines between patches, strong ones where kept meets dropped."""
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
  """Images in rows, each with its label (wrapped) below it.

  Args:
    images: at least one image; shapes may differ.
    labels: one text an image, or None.
    columns: images a row; at most six when not given.
    cell: longer side of an image in pixels.

  Raises:
    ValueError: no images, or not one label an image.
  """
  if not images or (labels is not None and len(labels) != len(images)):
    given = "no" if labels is None else str(len(labels))
    raise ValueError(
      f"a contact sheet of {len(images)} images with {given} labels: give at"
      " least one image, and one label an image or none at all."
    )
  columns = columns or min(len(images), 6)
  font = ImageFont.load_default(size=max(11, cell // 12))
  texts = _wrapped(labels or [""] * len(images), cell, font)
  firsts = range(0, len(images), columns)
  heights = [
    cell + _GAP + round(1.3 * font.size) * max(map(len, texts[i : i + columns]))
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
    place, text = (left, top + cell + 2), "\n".join(texts[i])
    draw.multiline_text(place, text, fill=_INK, font=font, spacing=2)
  return sheet


def _wrapped(labels: Sequence[str], width: int, font) -> list[list[str]]:
  """The lines of each label that fit `width` pixels, about."""
  characters = max(8, int(width / (font.size * 0.52)))
  return [textwrap.wrap(label, characters) for label in labels]


def codebook_sheet(
  examples: Mapping[int, Sequence[ImageLike]],
  *,
  shown: int = 8,
  columns: int = 4,
  cell: int = 28,
) -> Image.Image:
  """What each code means: its number and patches that were given it.

  Args:
    examples: code → images of patches, in the order to show them.
    shown: patches a code; missing ones are left blank.
    columns: codes a row.
    cell: side of a patch in pixels.

  Raises:
    ValueError: no codes.
  """
  if not examples:
    raise ValueError("a codebook sheet of no codes: give code → patches.")
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
    place = (left + label - 6, top + cell // 2)
    draw.text(place, str(code), fill=_FAINT, font=font, anchor="rm")
    for j, patch in enumerate(patches[:shown]):
      image = to_pil(patch).resize((cell, cell), Image.Resampling.NEAREST)
      sheet.paste(image, (left + label + j * (cell + 1), top))
  return sheet
