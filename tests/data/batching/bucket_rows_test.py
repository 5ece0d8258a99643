"""Rows of bucketed images."""

import json

import numpy as np
import pytest
from PIL import Image

from lavit_jax.core import errors
from lavit_jax.data.batching import bucket_rows, buckets, pipeline
from lavit_jax.data.images import image_sizes
from lavit_jax.data.sources import jsonl

_BUCKETS = ((32, 32), (24, 32), (32, 24))
_SIZES = ((40, 40), (30, 40), (40, 30), (60, 80), (64, 64), (50, 40), (33, 44))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Images whose red and green encode column and row; one is broken."""
  folder = tmp_path_factory.mktemp("pictures")
  rows = []
  for n, (height, width) in enumerate(_SIZES):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    pixels[..., 2] = n
    Image.fromarray(pixels).save(folder / f"{n}.png")
    rows.append({"image": f"{n}.png"})
  whole = (folder / "0.png").read_bytes()
  (folder / "half.png").write_bytes(whole[: len(whole) // 2])
  rows.append({"image": "half.png"})
  path = folder / "index.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  return jsonl.JsonlSource(path, 16)


def _batches(source, **kwargs):
  kwargs = {"seed": 1, "limit_share": 1.0} | kwargs
  return bucket_rows.batches(source, _BUCKETS, 4, **kwargs)


def test_a_batch_has_one_shape_and_all_images_its_ratio(source):
  assigned = buckets.assign(image_sizes.of(source), _BUCKETS)
  seen = set()
  data = pipeline.iterate(_batches(source), num_threads=0)
  for _ in range(30):
    batch = next(data)
    size = batch["target"].shape[1:3]
    b = _BUCKETS.index(size)
    seen.add(size)
    assert (assigned[batch["index"]] == b).all()
    assert (batch["sizes"][:, 4:] == size).all()
    assert batch["image"].shape == (4, 16, 16, 3)
  assert seen == set(_BUCKETS)


def test_a_bucket_with_fewer_images_than_a_batch_is_warned_of(source, caplog):
  assigned = buckets.assign(image_sizes.of(source), _BUCKETS)
  assert buckets.rare(assigned, 3, 4) == {0: 3, 1: 3, 2: 2}
  assert buckets.rare(assigned, 3, 3) == {2: 2}
  _batches(source)
  said = [r.getMessage() for r in caplog.records if "epochs" in r.msg]
  assert len(said) == 3
  assert "bucket (32, 24) has 2 of the 8 images" in said[2]
  assert "come once in 2 epochs" in said[2]
  assert not any("nearest other" in line for line in said)  # all are rare
  assert all("batch_size of at most 3" in line for line in said)
  caplog.clear()
  _batches(source, seed=None)  # held out: each once, with gaps
  assert "epochs" not in caplog.text


def test_removing_a_bucket_is_advised_only_if_another_is_left(source, caplog):
  bucket_rows.batches(source, _BUCKETS, 3, seed=0)  # the last alone is rare
  (said,) = [r.getMessage() for r in caplog.records if "epochs" in r.msg]
  assert "Remove it from data.buckets" in said
  caplog.clear()
  bucket_rows.batches(source, _BUCKETS[:1], 9, seed=0)
  (said,) = [r.getMessage() for r in caplog.records if "epochs" in r.msg]
  assert "Remove it from data.buckets" not in said
  assert "batch_size of at most 8" in said


def test_hosts_together_see_the_rows_of_one_host(source):
  whole = _batches(source)
  for k in range(5):
    parts = [
      next(pipeline.iterate(whole, start_batch=k, num_threads=0, rows=share))
      for share in ([0, 1], [2, 3])
    ]
    for name, value in whole[k].items():
      joined = np.concatenate([part[name] for part in parts])
      np.testing.assert_array_equal(joined, value)


def test_size_conditioning_describes_the_part_that_is_shown(source):
  batches = _batches(source, crop="random")
  for k in range(12):
    batch = batches[k]
    for row in range(4):
      if not batch["valid"][row]:
        continue
      height, width, top, left, rows, columns = batch["sizes"][row]
      assert (height, width) == _SIZES[batch["index"][row]]
      scale = max(rows / height, columns / width)
      target = batch["target"][row].astype(np.float32)
      # Red runs from 0 to 255 over the scaled image's width, and so on.
      middle = target[int(rows) // 2, int(columns) // 2]
      for channel, start, side, whole in (
        (0, left, columns, width * scale),
        (1, top, rows, height * scale),
      ):
        expected = 255 * (start + side // 2 + 0.5) / whole
        np.testing.assert_allclose(middle[channel], expected, atol=8)


def test_the_tokenizer_sees_the_same_part(source):
  batch = _batches(source, crop="random")[3]
  for image, target in zip(batch["image"], batch["target"], strict=True):
    for channel in (0, 1):
      means = image[..., channel].mean(), target[..., channel].mean()
      np.testing.assert_allclose(*means, atol=3)


def test_an_image_that_cannot_be_decoded_is_a_row_without_weight(source):
  batches = _batches(source, seed=None)
  rows = [batches[k] for k in range(len(batches))]
  index = np.concatenate([b["index"] for b in rows])
  valid = np.concatenate([b["valid"] for b in rows])
  assert sorted(index[index >= 0]) == list(range(8))  # each once
  assert not valid[index == 7].any()
  assert valid.sum() == 7
  assert batches.faults[0].names["half.png"] == 1


def test_unavailable_crops_are_refused(source):
  with pytest.raises(errors.ConfigError, match="one of"):
    _batches(source, crop="left")
  with pytest.raises(errors.ConfigError, match="random"):
    _batches(source, crop="random", seed=None)


def test_no_image_that_can_be_read_is_an_error(tmp_path):
  (tmp_path / "a.png").write_bytes(b"nothing")
  path = tmp_path / "index.jsonl"
  path.write_text(json.dumps({"image": "a.png"}))
  with pytest.raises(errors.DataError, match="can be read"):
    _batches(jsonl.JsonlSource(path, 16))
