"""Buckets: bucket, crop and batch of each image."""

import numpy as np
import pytest
from PIL import Image

from lavit_jax.core import errors
from lavit_jax.data.batching import buckets
from lavit_jax.data.images import image_sizes
from lavit_jax.diffusion import stable_diffusion

_SDXL = tuple(stable_diffusion.RATIOS.values())


def test_an_image_goes_to_the_nearest_ratio():
  sizes = [(30, 40), (0, 0), (100, 100), (400, 300), (90, 160), (1, 9)]
  found = buckets.assign(sizes, ((8, 8), (6, 8), (8, 6)))
  assert found.tolist() == [1, buckets.NONE, 0, 2, 1, 1]


def test_each_ratio_of_sdxl_is_its_own_bucket():
  sizes = [(h * 3, w * 3) for h, w in _SDXL]
  assert buckets.assign(sizes, _SDXL).tolist() == list(range(6))


@pytest.mark.parametrize("wrong", [(), ((0, 8),)])
def test_buckets_without_pixels_are_refused(wrong):
  with pytest.raises(errors.ConfigError, match=r"data\.buckets"):
    buckets.assign([(1, 1)], wrong)


@pytest.mark.parametrize("anchor", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("size", [(80, 200), (333, 100), (64, 64), (7, 9)])
def test_a_view_has_the_ratio_lies_within_and_touches_two_sides(size, anchor):
  view = buckets.view(size, (48, 32), anchor)
  left, top, right, bottom = view.box
  width, height = right - left, bottom - top
  np.testing.assert_allclose(height / width, 48 / 32)
  assert left >= 0
  assert top >= 0
  assert right <= size[1] + 1e-9
  assert bottom <= size[0] + 1e-9
  np.testing.assert_allclose(max(width / size[1], height / size[0]), 1.0)
  scale = 48 / height
  wanted = (*size, round(top * scale), round(left * scale), 48, 32)
  assert view.sizes == wanted


def test_the_sizes_of_a_view_worked_out_by_hand():
  """80 x 200 scaled to 40 x 100: the middle 40 columns begin at 30."""
  view = buckets.view((80, 200), (40, 40))
  assert view.box == (60, 0, 140, 80)
  assert view.sizes == (80, 200, 0, 30, 40, 40)
  corner = buckets.view((80, 200), (40, 40), (1, 1))
  assert corner.sizes == (80, 200, 0, 60, 40, 40)


def _plan(seed=3, count=50):
  assigned = np.array([0, 1, 1, 2, 1, buckets.NONE, 0] * count)[:count]
  return assigned, buckets.BucketPlan(assigned, 3, 4, seed)


def test_a_batch_is_of_one_bucket_in_any_order_of_access():
  assigned, plan = _plan()
  _, other = _plan()
  order = np.random.default_rng(0).permutation(60)
  late = {int(k): other.batch(int(k)) for k in order}
  for k in range(60):
    bucket, images = plan.batch(k)
    assert (assigned[images] == bucket).all()
    assert late[k][0] == bucket
    np.testing.assert_array_equal(late[k][1], images)


def test_another_seed_gives_another_order():
  _, one = _plan(seed=1)
  _, two = _plan(seed=2)
  batches = lambda plan: [plan.batch(k)[1].tolist() for k in range(20)]
  assert batches(one) != batches(two)


def test_each_image_comes_once_an_epoch_of_its_bucket():
  assigned, plan = _plan()
  seen = {b: [] for b in range(3)}
  for k in range(200):
    bucket, images = plan.batch(k)
    seen[bucket] += images.tolist()
  for b, images in seen.items():
    size = int((assigned == b).sum())
    assert len(images) >= 2 * size
    for epoch in range(len(images) // size):
      part = images[epoch * size : (epoch + 1) * size]
      assert sorted(part) == np.flatnonzero(assigned == b).tolist()


@pytest.mark.parametrize("sizes", [[2, 3, 1], [57, 1, 0, 300], [1, 1], [9]])
def test_of_n_batches_a_bucket_has_as_many_as_images(sizes):
  assigned = np.repeat(np.arange(len(sizes)), sizes)
  plan = buckets.BucketPlan(assigned, len(sizes), 4, 0)
  total = len(assigned)
  found = np.array([plan.bucket(k) for k in range(3 * total)])
  ones = found[:, None] == np.arange(len(sizes))
  for epoch in range(3):
    part = ones[epoch * total : (epoch + 1) * total]
    assert part.sum(axis=0).tolist() == sizes
  # And spread evenly: never far from their share at any moment.
  due = np.arange(1, 3 * total + 1)[:, None] * np.array(sizes) / total
  assert np.abs(ones.cumsum(axis=0) - due).max() < 3


def test_every_image_is_shown_equally_often_whatever_its_bucket():
  sizes, batch = [37, 1, 3], 4
  assigned = np.repeat(np.arange(3), sizes)
  plan = buckets.BucketPlan(assigned, 3, batch, 1)
  shown = np.zeros(len(assigned), int)
  for k in range(len(assigned)):
    np.add.at(shown, plan.batch(k)[1], 1)
  assert shown.tolist() == [batch] * len(assigned)


def test_one_odd_image_of_a_million_is_shown_as_often_as_the_others():
  count, batch = 1_000_001, 64
  assigned = np.zeros(count, np.int8)
  assigned[-1] = 1
  plan = buckets.BucketPlan(assigned, 2, batch, 0)
  turns = [k for k in range(count) if plan.bucket(k) == 1]
  assert len(turns) == 1  # in 64 epochs, and then 64 times
  bucket, images = plan.batch(turns[0] + count)
  assert bucket == 1
  assert images.tolist() == [count - 1] * batch
  assert buckets.rare(assigned, 2, batch) == {1: 1}


def test_the_position_in_a_bucket_far_ahead_is_that_of_counting():
  _, plan = _plan()
  counts = [0, 0, 0]
  for k in range(700):
    bucket = plan.bucket(k)
    assert plan._find_turn(k) == (bucket, counts[bucket])
    counts[bucket] += 1


def test_a_bucket_without_images_gets_no_batch():
  plan = buckets.BucketPlan(np.array([0, 2, 2]), 3, 2, 0)
  assert {plan.bucket(k) for k in range(30)} == {0, 2}


def test_one_pass_shows_each_image_once_and_fills_up_with_gaps():
  assigned = np.array([0, 1, 0, 0, buckets.NONE, 1])
  one_pass = buckets.OnePass(assigned, 2, 2)
  batches = [
    (one_pass.bucket(k), [one_pass.image(k, j) for j in range(2)])
    for k in range(len(one_pass))
  ]
  assert batches == [(0, [0, 2]), (1, [1, 5]), (0, [3, buckets.NONE])]


def test_nothing_readable_is_an_error():
  with pytest.raises(errors.DataError, match="None of 2 images"):
    buckets.BucketPlan(np.array([-1, -1]), 1, 2, 0)


class _Files:
  """Two images, one turned by its EXIF orientation, and one broken."""

  image_size, num_images, name = 8, 3, "files"

  def __init__(self, folder):
    Image.new("RGB", (20, 10)).save(folder / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(folder / "1.jpg", exif=exif)
    (folder / "2.png").write_bytes(b"no image")
    self._paths = [folder / name for name in ("0.png", "1.jpg", "2.png")]

  def encoded(self, i):
    return self._paths[i]

  def image_key(self, i):
    return str(self._paths[i])


def test_sizes_come_from_headers_upright(tmp_path):
  found = image_sizes.of(_Files(tmp_path)).tolist()
  assert found == [[10, 20], [20, 10], [0, 0]]
