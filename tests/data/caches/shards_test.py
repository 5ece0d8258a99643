"""Caches that were written before `shards.py` was: same files, same meaning.

tests/data_files/caches.zip holds, written by the code of that time from the
records below, codes/ and latents/, and of both an unfinished one: of the codes
one shard of three, of the latents four images of six.
"""

import pathlib
import zipfile

import numpy as np
import pytest
from array_record.python import array_record_module

from lavit_jax.core import errors
from lavit_jax.data.batching import buckets
from lavit_jax.data.caches import codes, latents, shards

_FILES = pathlib.Path(__file__).parents[2] / "data_files" / "caches.zip"
_CODES = codes.Meta(
  source="data",
  tokenizer="weights",
  num_images=10,
  num_patches=9,
  num_codes=100,
  shard_size=4,
  data="ten images",
  model="a model",
  pictures="bytes",
)
_ASSIGNED = np.array([0, 1, 0, buckets.NONE, 1, 0, 1], np.int8)
_LATENTS = latents.Meta(
  source="data",
  vae="weights",
  num_images=7,
  buckets=((8, 8), (8, 4)),
  scale=4,
  channels=3,
  data="seven",
  model="m",
  pictures="bytes",
)


def _code_record(i):
  if i == 3:  # a bad image
    return i, None, None
  rng = np.random.default_rng(i)
  keep = rng.random(9) < 0.5
  keep[i % 9] = True
  return i, keep, rng.integers(0, 100, keep.sum())


def _latent_record(i):
  if i == 4:  # a bad image
    return None
  shape = _LATENTS.shape(_LATENTS.buckets[_ASSIGNED[i]])
  return np.random.default_rng(i).normal(size=shape).astype(np.float16)


def _write_codes(directory):
  records = lambda *images: map(_code_record, range(*images))
  return codes.write(directory, records, _CODES)


def _write_latents(directory):
  records = lambda images: (_latent_record(i) for i in images)
  return latents.write(directory, records, _LATENTS, _ASSIGNED)


_WRITERS = {"codes": _write_codes, "latents": _write_latents}


@pytest.fixture
def stored(tmp_path, monkeypatch):
  """The folder with the caches of that time."""
  monkeypatch.setattr(latents, "_SHARD_SIZE", 2)
  with zipfile.ZipFile(_FILES) as file:
    file.extractall(tmp_path)
  return tmp_path


def _content(path):
  """Bytes of a file; its records where a library packs them."""
  if path.suffix != ".array_record":
    return path.read_bytes()
  reader = array_record_module.ArrayRecordReader(str(path))
  return reader.read_all()


def _contents(folder):
  return {path.name: _content(path) for path in folder.iterdir()}


@pytest.mark.parametrize("kind", _WRITERS)
def test_a_cache_has_the_files_it_had(kind, stored, tmp_path):
  _WRITERS[kind](tmp_path / "new")
  assert _contents(tmp_path / "new") == _contents(stored / kind)


@pytest.mark.parametrize("kind", _WRITERS)
def test_an_unfinished_cache_of_that_time_is_resumed(kind, stored):
  resumed = stored / f"{kind}_begun"
  module, meta = {"codes": (codes, _CODES), "latents": (latents, _LATENTS)}[
    kind
  ]
  assert module.resume_point(resumed, meta) == 4
  _WRITERS[kind](resumed)
  assert not (stored / f"{kind}_begun.partial").exists()
  assert _contents(resumed) == _contents(stored / kind)


def test_codes_of_that_time_are_read(stored):
  cache = codes.CodeCache.load(stored / "codes")
  assert cache.meta == _CODES
  assert cache.fingerprint() == "0c3d7d6c36317a264dcb4f5455e48857"
  for i in range(10):
    _, keep, ids = _code_record(i)
    if keep is None:
      assert cache.counts[i] == codes.BAD
    else:
      np.testing.assert_array_equal(cache.keep(i), keep)
      np.testing.assert_array_equal(cache.codes(i), ids)


def test_latents_of_that_time_are_read(stored):
  cache = latents.LatentCache.load(stored / "latents")
  assert cache.meta == _LATENTS
  assert cache.fingerprint() == "326e3bfa7776aa3bd864c080d3bf3114"
  np.testing.assert_array_equal(cache.assigned, _ASSIGNED)
  for i in np.flatnonzero(_ASSIGNED != buckets.NONE):
    value = _latent_record(i)
    assert cache.good(i) == (value is not None)
    if value is not None:
      np.testing.assert_array_equal(cache.latents(i), value)


def test_messages_show_what_a_fingerprint_is_of():
  digest = "0123456789abcdef"
  assert shards.described(digest, "my.jsonl") == "my.jsonl (0123456789ab)"
  assert shards.described(digest, "") == digest


@pytest.mark.parametrize("kind", _WRITERS)
def test_a_folder_of_something_else_is_left_alone(kind, tmp_path):
  partial = tmp_path / "out.partial"
  partial.mkdir()
  (partial / "mine.txt").write_text("mine")
  with pytest.raises(errors.DataError, match=r"something else \(mine.txt\)"):
    _WRITERS[kind](tmp_path / "out")
  assert [path.name for path in partial.iterdir()] == ["mine.txt"]


def test_two_that_write_the_same_part_write_one_cache(tmp_path, monkeypatch):
  """The second finds that the first has completed it meanwhile."""
  monkeypatch.setattr(shards, "_PAUSE", 0.01)
  real = shards.Writer._fill
  caches = []

  def fill(self, *args):
    real(self, *args)
    monkeypatch.setattr(shards.Writer, "_fill", real)
    caches.append(_write_codes(tmp_path / "out"))

  monkeypatch.setattr(shards.Writer, "_fill", fill)
  caches.append(_write_codes(tmp_path / "out"))
  assert [len(cache) for cache in caches] == [_CODES.num_images] * 2
