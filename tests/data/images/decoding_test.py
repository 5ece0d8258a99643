"""Two ways to the square of an image: how far they are from each other."""

import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from lavit_jax.core import image_io
from lavit_jax.data.images import decoding
from tests.data.indexes import table_files, tars

_COCO = pathlib.Path(__file__).parents[2] / "data_files" / "coco"


def _far(data, side=224):
  """Returns the largest and the mean distance of the two ways."""
  both = [
    way(data, side).astype(int) for way in (decoding.exact, decoding.fast)
  ]
  far = np.abs(both[0] - both[1])
  return far.max(), far.mean()


def _photographs():
  return sorted(_COCO.rglob("*.jpg"))[:6]


def test_photographs_differ_by_rounding():
  assert _photographs()
  for path in _photographs():
    largest, mean = _far(path)
    assert largest <= 16
    assert mean < 0.5


def test_large_photographs_are_decoded_at_a_part_of_their_size(monkeypatch):
  """What docs/data.md says of the difference."""
  path, *_ = _photographs()
  image = Image.open(path)
  large = image.resize((image.width * 8, image.height * 8))
  file = io.BytesIO()
  large.save(file, "JPEG", quality=92)
  sizes = []
  real = decoding.resized
  monkeypatch.setattr(
    decoding, "resized", lambda p, side: sizes.append(p.shape) or real(p, side)
  )
  largest, mean = _far(file.getvalue())
  assert min(sizes[0][:2]) < min(large.size) / 2
  assert min(sizes[0][:2]) >= 1.5 * 224
  assert largest <= 40
  assert mean < 1.0


def _turned(value, order="II"):
  """A JPEG whose EXIF block says how it is to be turned."""
  exif = Image.Exif()
  exif.endian = "<" if order == "II" else ">"
  exif[0x0112] = value
  exif[0x010F] = "a maker"
  file = io.BytesIO()
  Image.open(io.BytesIO(tars.jpeg(1, (24, 40)))).save(file, "JPEG", exif=exif)
  return file.getvalue()


@pytest.mark.parametrize("value", [1, 3, 6, 8])
def test_photographs_are_upright(value):
  data = _turned(value)
  assert decoding._is_plain(data) == (value == 1)
  assert _far(data, 16)[0] <= 16


@pytest.mark.parametrize(
  "damage",
  [
    lambda d: d.replace(b"II*\0", b"XX*\0").replace(b"MM\0*", b"XX\0*"),
    lambda d: d.replace(b"\x12\x01\x03\0", b"\x12\x01\x04\0").replace(
      b"\x01\x12\0\x03", b"\x01\x12\0\x04"
    ),
    lambda d: d + b"tiff:Orientation",
  ],
)
def test_what_is_unclear_is_decoded_exactly(damage):
  data = damage(_turned(1))
  assert not decoding._is_plain(data)
  assert _far(data, 16) == (0, 0)


def _encoded(mode, format, **kwargs):
  file = io.BytesIO()
  image = Image.open(io.BytesIO(table_files.encoded(3, size=(40, 30))))
  image.convert(mode).save(file, format, **kwargs)
  return file.getvalue()


@pytest.mark.parametrize(
  "data",
  [
    _encoded("L", "JPEG"),
    _encoded("CMYK", "JPEG"),
    _encoded("RGB", "PNG"),
    _encoded("RGB", "JPEG", progressive=True),
    _encoded("RGB", "JPEG", subsampling=0),
    _encoded("RGB", "JPEG", keep_rgb=True),
    _encoded("P", "GIF"),
  ],
  ids=["grey", "cmyk", "png", "progressive", "444", "rgb", "gif"],
)
def test_every_kind_of_image_is_read(data):
  largest, mean = _far(data, 32)
  assert largest <= 24
  assert mean < 1


def test_damaged_images_are_told_alike():
  data = tars.jpeg(2, (64, 64))
  for cut in range(0, len(data), 97):
    said = []
    for way in (decoding.exact, decoding.fast):
      try:
        said.append(way(data[:cut], 16, "a").shape)
      except image_io.ImageError as error:
        said.append(str(error))
    assert said[0] == said[1]


@pytest.mark.shared
def test_odd_images_are_read_alike():
  folder = pathlib.Path(os.environ["LAVIT_SHARED"], "data", "G_tricky")
  for path in sorted(folder.iterdir()):
    said = []
    for way in (decoding.exact, decoding.fast):
      try:
        said.append(way(path, 64).astype(int))
      except image_io.ImageError as error:
        said.append(str(error))
    if isinstance(said[0], str):
      assert said[0] == said[1]
    else:
      assert np.abs(said[0] - said[1]).max() <= 24
