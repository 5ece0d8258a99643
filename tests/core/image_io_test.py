import io
import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, features

from lavit_jax.core import image_io

_TRICKY = pathlib.Path(__file__).parents[1] / "data_files" / "tricky"
_MANIFEST = json.loads((_TRICKY / "manifest.json").read_text())
_SHARED = os.environ.get("LAVIT_SHARED")
_HERE = [m for m in _MANIFEST if (_TRICKY / m["image"]).exists()]
_LARGE = [m for m in _MANIFEST if not (_TRICKY / m["image"]).exists()]
_QUIET = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::Warning")


def _name(entry):
  return entry["image"]


def _check(folder, entry):
  path = folder / entry["image"]
  if entry["verdict"] == "reject":
    with pytest.raises(image_io.ImageError, match=entry["image"]):
      image_io.load(path)
    return
  image = image_io.load(path)
  width, height = entry["size"]
  turned = entry["orientation"] in (5, 6, 7, 8)
  assert image.size == ((height, width) if turned else (width, height))
  assert image.mode == "RGB"


@_QUIET
@pytest.mark.parametrize("entry", _HERE, ids=_name)
def test_odd_file_is_treated_as_its_manifest_says(entry):
  _check(_TRICKY, entry)


@_QUIET
@pytest.mark.shared
@pytest.mark.skipif(not _SHARED, reason="needs LAVIT_SHARED")
@pytest.mark.parametrize("entry", _LARGE, ids=_name)
def test_large_odd_file_is_treated_as_its_manifest_says(entry):
  _check(pathlib.Path(_SHARED) / "data" / "G_tricky", entry)


def _array(name):
  return np.asarray(image_io.load(_TRICKY / name)).astype(np.float32)


def test_cmyk_is_the_image_not_its_negative():
  error = np.abs(_array("pil_sample_cmyk.jpg") - _array("pil_sample_rgb.jpg"))
  assert error.mean() < 12


@pytest.mark.parametrize("turn", [3, 6])
def test_orientation_makes_the_image_upright(turn):
  upright = _array("hopper.jpg")
  error = np.abs(_array(f"hopper_orientation_{turn}.jpg") - upright)
  assert error.mean() < 12


@pytest.mark.parametrize(
  "kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "GIF", "JPEG2000", "AVIF"]
)
def test_the_header_gives_the_size_of_the_loaded_image(kind):
  if kind == "AVIF" and not features.check("avif"):
    pytest.skip("this Pillow has no AVIF")  # before 11.3
  turned = set()
  for orientation in range(1, 9):
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (60, 40)).save(file, kind, exif=exif)
    height, width = image_io.size_of(file.getvalue())
    assert image_io.load(file.getvalue()).size == (width, height)
    turned |= {height > width}
  bare = kind in ("GIF", "JPEG2000")  # no place for an orientation
  assert turned == ({False} if bare else {False, True})


@_QUIET
@pytest.mark.parametrize("entry", _HERE, ids=_name)
def test_the_header_gives_the_size_of_odd_files(entry):
  if entry["verdict"] != "reject":
    found = image_io.load(_TRICKY / entry["image"]).size[::-1]
    assert image_io.size_of(_TRICKY / entry["image"]) == found


def test_transparent_pixels_are_white_not_their_hidden_colour():
  image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
  image.putpixel((1, 0), (255, 0, 0, 255))
  pixels = np.asarray(image_io.load(image))
  np.testing.assert_array_equal(pixels[0], [[255, 255, 255], [255, 0, 0]])


def test_palette_transparency_is_white():
  image = Image.new("P", (2, 1))
  image.putpalette([10, 20, 30, 40, 50, 60])
  image.putpixel((1, 0), 1)
  file = io.BytesIO()
  image.save(file, "PNG", transparency=0)
  pixels = np.asarray(image_io.load(file.getvalue()))
  np.testing.assert_array_equal(pixels[0], [[255, 255, 255], [40, 50, 60]])


def test_sixteen_bits_are_scaled_not_clipped():
  values = np.array([[0, 257, 32896, 65535]], np.uint16)
  file = io.BytesIO()
  Image.fromarray(values).save(file, "PNG")
  pixels = np.asarray(image_io.load(file.getvalue()))
  np.testing.assert_array_equal(pixels[0, :, 0], [0, 1, 128, 255])


def test_one_bit_gives_black_and_white():
  assert set(np.unique(_array("hopper_bw_500.png"))) == {0, 255}


def test_first_frame_of_an_animation():
  frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
  file = io.BytesIO()
  frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
  pixels = np.asarray(image_io.load(file.getvalue()))
  np.testing.assert_array_equal(pixels[0, 0], [255, 0, 0])


@_QUIET
def test_bombs_are_refused_without_being_decoded(monkeypatch):
  def unpack(_):
    raise AssertionError("unpacked")

  monkeypatch.setattr(ImageFile.ImageFile, "load", unpack)
  monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", unpack)
  with pytest.raises(image_io.ImageError, match="limit of"):
    image_io.load(_TRICKY / "made_bomb_12000x12000.png")


def test_pixel_limit_counts_pixels():
  image = Image.new("RGB", (10, 10))
  assert image_io.load(image, max_pixels=100).size == (10, 10)
  with pytest.raises(image_io.ImageError, match="limit of 99"):
    image_io.load(image, max_pixels=99)


@pytest.mark.parametrize(
  ("source", "said"),
  [
    ("missing.jpg", "no such file"),
    (os.curdir, "folder"),
    ("https://example.org/a.jpg", "web address"),
    ("a\0b.jpg", "cannot be read"),
    (b"", "0 bytes"),
    (b"<html>", "no image"),
    (3, "int"),
    (np.zeros((2, 3, 5), np.uint8), "2, 3, 5"),
    (np.zeros((2, 2), np.int64), "int64"),
    (np.full((2, 2, 3), 1.5), r"\[0, 1\]"),
    (np.full((2, 2, 3), np.nan), r"\[0, 1\]"),
    (np.zeros((0, 2, 3), np.uint8), "no pixels"),
    (Image.new("F", (2, 2)), "floating"),
    (Image.new("RGB", (1000, 2)), "thinner"),
  ],
)
def test_sources_without_an_image_are_refused_by_name(source, said):
  with pytest.raises(image_io.ImageError, match=said):
    image_io.load(source)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (3, 5, 3), (3, 5, 4)])
def test_arrays_of_every_layout_become_rgb(shape):
  array = np.full(shape, 255, np.uint8)
  image = image_io.load(array)
  assert (image.mode, image.size) == ("RGB", (5, 3))
  assert np.asarray(image).min() == 255


def test_float_and_uint8_arrays_give_the_same_image():
  array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
  same = np.asarray(image_io.load(array / np.float32(255)))
  np.testing.assert_array_equal(same, array)


def test_path_bytes_and_open_image_give_the_same_pixels():
  path = _TRICKY / "hopper.jpg"
  from_path = np.asarray(image_io.load(path))
  np.testing.assert_array_equal(
    np.asarray(image_io.load(path.read_bytes())), from_path
  )
  with Image.open(path) as image:
    np.testing.assert_array_equal(np.asarray(image_io.load(image)), from_path)


def test_resize_is_pillows_bicubic_straight_to_a_square():
  image = image_io.load(_TRICKY / "flower.webp")
  pixels = image_io.to_uint8(image, 24)
  expected = image.resize((24, 24), Image.Resampling.BICUBIC)
  assert (pixels.dtype, pixels.shape) == (np.uint8, (24, 24, 3))
  np.testing.assert_array_equal(pixels, np.asarray(expected))


def test_normalize_uses_clips_mean_and_deviation():
  pixels = image_io.normalize(np.full((2, 2, 3), 255, np.uint8))
  expected = (1 - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array(
    [0.26862954, 0.26130258, 0.27577711]
  )
  assert pixels.dtype == np.float32
  np.testing.assert_allclose(pixels[0, 0], expected, rtol=1e-6)


def test_normalize_takes_bytes_floats_and_jax_arrays():
  array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
  expected = image_io.normalize(array)
  np.testing.assert_allclose(
    image_io.normalize(array / np.float32(255)), expected, atol=1e-6
  )
  on_device = image_io.normalize(jnp.asarray(array))
  assert isinstance(on_device, jnp.ndarray)
  np.testing.assert_allclose(on_device, expected, atol=1e-6)


def test_to_pil_clips_and_rounds():
  pixels = np.array([[[-1.0, 0.5, 2.0]]])
  np.testing.assert_array_equal(
    np.asarray(image_io.to_pil(pixels)), [[[0, 128, 255]]]
  )


@pytest.mark.parametrize("bad", [np.zeros((2, 2)), np.full((1, 1, 3), np.nan)])
def test_to_pil_refuses_arrays_that_are_no_image(bad):
  with pytest.raises(image_io.ImageError):
    image_io.to_pil(bad)
