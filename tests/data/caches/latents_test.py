"""The latent cache: complete or absent, and used only with its own data."""

import dataclasses
import functools
import hashlib
import json
import os
import string
from unittest import mock

import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.data.batching import buckets
from lavit_jax.data.caches import latents

_ASSIGNED = np.array([0, 1, 0, buckets.NONE, 1, 0, 1], np.int8)
_META = latents.Meta(
  source="data",
  vae="weights",
  num_images=len(_ASSIGNED),
  buckets=((8, 8), (8, 4)),
  scale=4,
  channels=3,
)
_BAD = 4  # image that cannot be decoded


def _latents(i):
  shape = _META.shape(_META.buckets[_ASSIGNED[i]])
  return np.random.default_rng(i).normal(size=shape).astype(np.float16)


def _records(numbers, stop_at=None):
  for i in numbers:
    if i == stop_at:
      raise KeyboardInterrupt
    yield None if i == _BAD else _latents(i)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
  monkeypatch.setattr(latents, "_SHARD_SIZE", 2)


def _write(directory, records=_records, meta=_META):
  return latents.write(directory, records, meta, _ASSIGNED)


def _check(cache):
  assert len(cache) == len(_ASSIGNED)
  np.testing.assert_array_equal(cache.assigned, _ASSIGNED)
  for i in np.flatnonzero(_ASSIGNED >= 0):
    if i == _BAD:
      assert not cache.good(i)
      assert not cache.latents(i).any()
    else:
      assert cache.good(i)
      np.testing.assert_array_equal(cache.latents(i), _latents(i))


def test_a_written_cache_reads_back(tmp_path):
  _check(_write(tmp_path / "a"))
  _check(latents.LatentCache.load(tmp_path / "a"))
  assert not (tmp_path / "a.partial").exists()


def test_special_characters_in_a_path_are_taken_literally(tmp_path):
  folder = tmp_path / "".join(c for c in string.punctuation if c != "/")
  _check(_write(folder))
  _check(latents.LatentCache.load(folder))


@pytest.mark.parametrize("stop_at", [0, 2, 5, 1, 6])
def test_an_interrupted_write_resumes_to_the_same_files(tmp_path, stop_at):
  _write(tmp_path / "straight")
  with pytest.raises(KeyboardInterrupt):
    _write(tmp_path / "a", lambda n: _records(n, stop_at))
  assert not (tmp_path / "a").exists()
  with pytest.raises(errors.DataError, match="unfinished latent"):
    latents.LatentCache.load(tmp_path / "a")
  done = latents.resume_point(tmp_path / "a", _META)
  asked = []
  _check(_write(tmp_path / "a", lambda n: _records(asked.extend(n) or n)))
  assert len(asked) == 6 - done
  names = sorted(path.name for path in (tmp_path / "straight").iterdir())
  assert names == sorted(path.name for path in (tmp_path / "a").iterdir())
  for name in names:
    left, right = (tmp_path / d / name for d in ("straight", "a"))
    assert left.read_bytes() == right.read_bytes()


def test_bytes_written_after_the_last_seal_are_written_again(tmp_path):
  """As a kill between data and seal leaves them."""
  with pytest.raises(KeyboardInterrupt):
    _write(tmp_path / "a", lambda n: _records(n, 1))
  with (tmp_path / "a.partial" / "latents-0.f16").open("ab") as file:
    file.write(b"torn")
  _check(_write(tmp_path / "a"))


@pytest.mark.parametrize(
  ("field", "value"),
  [("source", "x"), ("vae", "x"), ("buckets", ((8, 8), (4, 8)))],
)
def test_other_data_weights_or_buckets_are_refused(tmp_path, field, value):
  _write(tmp_path / "a")
  with pytest.raises(errors.DataError, match=f"another {field}"):
    latents.LatentCache.load(tmp_path / "a", **{field: value})
  other = dataclasses.replace(_META, **{field: value})
  with pytest.raises(errors.DataError, match=f"another {field}"):
    _write(tmp_path / "a", meta=other)
  with pytest.raises(KeyboardInterrupt):
    _write(tmp_path / "b", lambda n: _records(n, 5))
  with pytest.raises(errors.DataError, match=f"another {field}"):
    _write(tmp_path / "b", meta=other)


def test_a_full_disk_keeps_finished_shards(tmp_path):
  real, calls = os.fsync, []

  def full(fd):
    calls.append(fd)
    if len(calls) == 8:
      raise OSError(28, "No space left on device")
    real(fd)

  with (
    mock.patch.object(os, "fsync", full),
    pytest.raises(errors.DataError, match=r"No space left.*make room"),
  ):
    _write(tmp_path / "a")
  assert latents.resume_point(tmp_path / "a", _META) > 0
  _check(_write(tmp_path / "a"))


def test_latents_of_a_wrong_shape_or_too_few_are_refused(tmp_path):
  with pytest.raises(errors.DataError, match="of shape"):
    _write(tmp_path / "a", lambda n: (np.zeros((1, 1, 3)) for _ in n))
  with pytest.raises(errors.DataError, match=r"1 images came .* 2 of 6"):
    _write(tmp_path / "b", lambda n: _records(n[:1]))


def test_missing_and_damaged_caches_are_reported(tmp_path):
  with pytest.raises(errors.DataError, match="holds no latent cache"):
    latents.LatentCache.load(tmp_path / "a")
  _write(tmp_path / "a")
  (tmp_path / "a" / "latents-1.f16").write_bytes(b"")
  with pytest.raises(errors.DataError, match="damaged"):
    latents.LatentCache.load(tmp_path / "a")
  _write(tmp_path / "b")
  (tmp_path / "b" / "assigned.npy").write_bytes(b"")
  with pytest.raises(errors.DataError, match="damaged"):
    latents.LatentCache.load(tmp_path / "b")
  (tmp_path / "c").mkdir()
  with pytest.raises(errors.DataError, match="no latent cache"):
    _write(tmp_path / "c")


def test_image_fingerprints_are_compared_where_both_sides_have_one(tmp_path):
  folder = tmp_path / "a"
  known = dataclasses.replace(_META, pictures="these")
  other = dataclasses.replace(_META, pictures="others")
  _write(folder, meta=known)
  load = functools.partial(latents.LatentCache.load, folder)
  assert load(images="these").fingerprint() == load().fingerprint()
  with pytest.raises(errors.DataError, match=r"images \(these, here others"):
    load(images="others")
  for step in (
    lambda: _write(folder, meta=other),
    lambda: latents.resume_point(folder, other),
  ):
    with pytest.raises(errors.DataError, match="another set of images"):
      step()
  _write(folder, meta=_META)  # no fingerprint of images
  # A cache of an earlier version loads and keeps its digest.
  meta = json.loads((folder / "meta.json").read_text())
  del meta["pictures"]
  (folder / "meta.json").write_text(json.dumps(meta))
  old = load(images="others")
  compared = {k: v for k, v in meta.items() if k not in ("data", "model")}
  digest = hashlib.sha256(json.dumps(compared, sort_keys=True).encode())
  digest.update(np.ascontiguousarray(old.assigned))
  assert old.fingerprint() == digest.hexdigest()[:32]


def test_a_kill_before_the_last_rename_loses_nothing(tmp_path):
  folder, replace = tmp_path / "a", os.replace

  def killed(source, target):
    if target == folder:
      raise KeyboardInterrupt
    replace(source, target)

  with (
    mock.patch.object(os, "replace", killed),
    pytest.raises(KeyboardInterrupt),
  ):
    _write(folder)
  assert not folder.exists()
  assert latents.resume_point(folder, _META) == 6
  with pytest.raises(errors.DataError, match="another vae"):
    _write(folder, meta=dataclasses.replace(_META, vae="others"))
  _check(_write(folder, None))  # no record is asked for again
