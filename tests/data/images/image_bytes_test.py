"""Fingerprints of images by some of their bytes."""

import json

import pytest
from PIL import Image

from lavit_jax.core import errors
from lavit_jax.core.storage import fetched
from lavit_jax.data import examples
from lavit_jax.data.images import image_bytes
from lavit_jax.data.sources import jsonl, shapes
from tests.data import fakes
from tests.train import fake_gcs


def _folder(path, colour=0, count=30):
  """my.jsonl of images of one size in bytes, whatever their colour."""
  path.mkdir()
  for i in range(count):
    Image.new("RGB", (4, 4), (colour, i, 0)).save(path / f"{i}.bmp")
  rows = [{"image": f"{i}.bmp", "caption": "a"} for i in range(count)]
  (path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return jsonl.JsonlSource(path / "my.jsonl", 8)


def test_fingerprints_of_files_with_one_name_differ_by_their_images(tmp_path):
  a, b = _folder(tmp_path / "a"), _folder(tmp_path / "b", 9)
  copied = _folder(tmp_path / "copy")
  assert examples.fingerprint(a) == examples.fingerprint(b)
  assert image_bytes.of(a) != image_bytes.of(b)
  assert image_bytes.of(a) == image_bytes.of(copied)
  assert len(image_bytes.of(a)) == 32
  (tmp_path / "copy" / "29.bmp").write_bytes(b"longer" * 99)  # the last one
  assert image_bytes.of(a) != image_bytes.of(copied)


def test_a_missing_image_changes_the_fingerprint(tmp_path):
  a, b = _folder(tmp_path / "a"), _folder(tmp_path / "b")
  (tmp_path / "b" / "0.bmp").unlink()
  assert image_bytes.of(a) != image_bytes.of(b)


def test_all_of_a_few_images_are_hashed(tmp_path):
  for count in (1, 3, 16):
    source = _folder(tmp_path / str(count), count=count)
    before = image_bytes.of(source)
    for i in range(count):
      path = tmp_path / str(count) / f"{i}.bmp"
      kept = path.read_bytes()
      path.write_bytes(kept[:-1] + b"x")
      assert image_bytes.of(source) != before
      path.write_bytes(kept)


def test_a_source_without_bytes_has_no_fingerprint():
  assert image_bytes.of(shapes.ShapesSource(size=4)) == ""
  assert image_bytes.of(fakes.Source({})) == ""


def test_few_bytes_are_read_from_a_store(tmp_path, monkeypatch):
  here = _folder(tmp_path / "a")
  asked, read = [], fetched.read_range

  def counted(path, start, stop):
    asked.append(stop - start)
    return read(path, start, stop)

  with fake_gcs.serving(monkeypatch) as store:
    fake_gcs.upload(store, tmp_path / "a", "gs://bucket/a")
    there = jsonl.JsonlSource("gs://bucket/a/my.jsonl", 8)
    monkeypatch.setattr(fetched, "read_range", counted)
    assert image_bytes.of(there) == image_bytes.of(here)
    assert len(asked) == 2 * 16
    assert max(asked) <= 1 << 16

    def fails(path, start, stop):
      raise OSError("503")

    monkeypatch.setattr(fetched, "read_range", fails)
    with pytest.raises(errors.DataError, match=r"0\.bmp.*503"):
      image_bytes.of(there)
