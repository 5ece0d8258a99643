"""Figures: the right patches bright, the right images in the right places."""

import numpy as np
import pytest
from PIL import Image

from lavit_jax.evaluate.report import figures

RED = np.full((8, 8, 3), (220, 20, 20), np.uint8)
BLUE = np.full((8, 8, 3), (20, 20, 220), np.uint8)


def saturation(pixels):
  pixels = np.asarray(pixels, int)
  return pixels.max(-1) - pixels.min(-1)


def test_kept_patches_are_bright_and_dropped_ones_grey():
  keep = np.zeros(16, bool)
  keep[[0, 6, 15]] = True  # raster order
  shown = saturation(figures.overlay_mask(RED, keep, size=64))
  centres = shown[8::16, 8::16]  # [4, 4]
  np.testing.assert_array_equal(centres > 150, keep.reshape(4, 4))
  assert centres[~keep.reshape(4, 4)].max() <= 2


def test_a_frame_stands_where_kept_meets_dropped_and_nowhere_between_kept():
  keep = np.zeros((4, 4), bool)
  keep[1:3, 1:3] = True
  shown = np.asarray(figures.overlay_mask(RED, keep, size=64), int)
  orange = (shown[..., 1] > 100) & (shown[..., 2] < 60)
  assert orange[16, 20:44].all()  # upper edge of the block
  assert orange[20:44, 47].all()  # right edge
  assert not orange[24:40, 24:40].any()  # inside, the border of two kept


def test_every_patch_is_framed_when_sides_do_not_divide():
  shown = figures.overlay_mask(
    np.zeros((30, 50, 3), np.uint8), np.ones(15, bool), size=50, grid=(3, 5)
  )
  assert shown.size == (50, 30)
  assert saturation(shown)[10, 10] == 0


@pytest.mark.parametrize("count", [15, 0])
def test_a_mask_that_fills_no_square_is_refused(count):
  if count:
    with pytest.raises(ValueError, match=r"15 patches.*3 x 3.*grid="):
      figures.overlay_mask(RED, np.ones(count, bool))
  else:
    with pytest.raises(ValueError, match="0 patches"):
      figures.overlay_mask(RED, np.ones(0, bool), grid=(2, 2))


def test_a_image_of_another_type_is_refused():
  with pytest.raises(ValueError, match=r"float32\[4, 4, 3\].*uint8"):
    figures.to_pil(np.zeros((4, 4, 3), np.float32))


def test_small_images_keep_their_pixels_when_enlarged():
  checker = np.indices((4, 4)).sum(0) % 2 * 255
  large = figures.fit(checker.astype(np.uint8), 64)
  assert set(np.asarray(large).reshape(-1)) == {0, 255}


def test_a_contact_sheet_holds_the_images_in_order_over_their_labels():
  images = [RED, BLUE, BLUE, RED, Image.fromarray(RED)]
  sheet = np.asarray(
    figures.contact_sheet(images, ["", "", "", "", "x"], columns=2, cell=40)
  )
  centres = [sheet[28 + 48 * (i // 2), 28 + 48 * (i % 2)] for i in range(4)]
  assert [pixel[0] > pixel[2] for pixel in centres] == [
    True,
    False,
    False,
    True,
  ]
  bottom = sheet[-20:, :40]
  assert bottom.min() < 100  # the one label
  assert sheet.shape[1] == 2 * 48 + 8


def test_a_long_label_is_wrapped_within_its_cell():
  sheet = np.asarray(figures.contact_sheet([RED], ["word " * 20], cell=100))
  assert sheet.shape[1] == 116
  assert sheet.shape[0] > 150
  assert (sheet[:, -6:] == 255).all()  # nothing runs over the edge


def test_images_that_are_not_square_keep_their_shape():
  wide = np.zeros((10, 40, 3), np.uint8)
  sheet = np.asarray(figures.contact_sheet([wide], cell=80))
  dark = (sheet < 128).all(-1)
  assert dark.sum() == 80 * 20


def test_a_contact_sheet_needs_images_and_a_label_each():
  with pytest.raises(ValueError, match="at least one image"):
    figures.contact_sheet([])
  with pytest.raises(ValueError, match="2 images with 1 labels"):
    figures.contact_sheet([RED, RED], ["a"])


def test_a_codebook_sheet_shows_each_codes_patches_in_a_strip():
  sheet = np.asarray(
    figures.codebook_sheet(
      {3: [RED, RED, BLUE], 500: [BLUE]}, shown=3, columns=1, cell=20
    )
  )
  first = sheet[8 + 10, [48 + 10, 48 + 31, 48 + 52]]
  second = sheet[8 + 25 + 10, [48 + 10, 48 + 31]]
  assert (first[:2] == RED[0, 0]).all()
  assert (first[2] == BLUE[0, 0]).all()
  assert (second[0] == BLUE[0, 0]).all()
  assert (second[1] == 255).all()  # no second patch
  assert sheet[8:28, 8:44].min() < 200  # the code's number
  with pytest.raises(ValueError, match="no codes"):
    figures.codebook_sheet({})
