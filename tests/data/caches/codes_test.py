import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import string

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from lavit_jax.core import errors
from lavit_jax.data.caches import codes as codes_lib

_META = codes_lib.Meta(
  source="data",
  tokenizer="weights",
  num_images=10,
  num_patches=9,
  num_codes=100,
  shard_size=4,
)


def _record(i, bad=(3,)):
  if i in bad:
    return i, None, None
  rng = np.random.default_rng(i)
  keep = rng.random(9) < 0.5
  keep[i % 9] = True
  return i, keep, rng.integers(0, 100, keep.sum())


def _records(start, stop=10):
  return (_record(i) for i in range(start, stop))


def _check(cache):
  assert len(cache) == 10
  for i in range(10):
    _, keep, codes = _record(i)
    if keep is None:
      assert cache.counts[i] == codes_lib.BAD
      assert not cache.keep(i).any()
      assert not len(cache.codes(i))
      continue
    assert cache.counts[i] == len(codes)
    np.testing.assert_array_equal(cache.keep(i), keep)
    np.testing.assert_array_equal(cache.codes(i), codes)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_written_cache_reads_back(tmp_path, monkeypatch, in_memory):
  if not in_memory:
    monkeypatch.setattr(codes_lib, "_IN_MEMORY", 0)
  codes_lib.write(tmp_path / "codes", _records, _META)
  _check(codes_lib.CodeCache.load(tmp_path / "codes"))
  assert [p.name for p in tmp_path.iterdir()] == ["codes"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_special_characters_in_a_path_are_taken_literally(
  tmp_path, monkeypatch, in_memory
):
  """ArrayRecord reads file[0:3] as a part of a file, file@3 as three."""
  if not in_memory:
    monkeypatch.setattr(codes_lib, "_IN_MEMORY", 0)
  signs = "".join(c for c in string.punctuation if c != "/")
  for name in (f"{signs}[0:3]", "codes@3", "**"):
    _check(codes_lib.write(tmp_path / name, _records, _META))
    _check(codes_lib.CodeCache.load(tmp_path / name))


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(
  st.integers(1, 300),
  st.sampled_from([2, 300, 65536, 65537, 1 << 20]),
  st.data(),
)
def test_a_record_keeps_any_mask_and_any_code(patches, codes, data):
  meta = dataclasses.replace(_META, num_patches=patches, num_codes=codes)
  bits = data.draw(st.lists(st.booleans(), min_size=patches, max_size=patches))
  bits[data.draw(st.integers(0, patches - 1))] = True
  rng = np.random.default_rng(0)
  ids = rng.integers(0, codes, sum(bits))
  ids[0] = codes - 1
  count, packed = codes_lib._pack((0, np.array(bits), ids), 0, meta)
  keep, found = codes_lib._unpack(packed, meta)
  assert count == sum(bits)
  np.testing.assert_array_equal(keep, bits)
  np.testing.assert_array_equal(found, ids)


def test_an_interrupted_write_resumes_where_it_stopped(tmp_path):
  def dies(first, stop):
    yield from _records(first, min(stop, 9))
    if stop > 9:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    codes_lib.write(tmp_path / "codes", dies, _META)
  assert not (tmp_path / "codes").exists()
  with pytest.raises(
    errors.DataError, match=r"unfinished code.*lavit tokenize"
  ):
    codes_lib.CodeCache.load(tmp_path / "codes")
  assert codes_lib.resume_point(tmp_path / "codes", _META) == 8
  asked = []

  def records(first, stop):
    asked.append((first, stop))
    return _records(first, stop)

  _check(codes_lib.write(tmp_path / "codes", records, _META))
  assert asked == [(8, 10)]


def test_a_finished_cache_is_not_written_again(tmp_path):
  codes_lib.write(tmp_path / "codes", _records, _META)
  assert codes_lib.resume_point(tmp_path / "codes", _META) == 10

  def never(*_):
    raise AssertionError("asked for images")

  _check(codes_lib.write(tmp_path / "codes", never, _META))


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_full_disk_leaves_no_cache_and_the_next_call_resumes(
  tmp_path, monkeypatch, shard
):
  fsync, calls = os.fsync, []

  def full(descriptor):
    calls.append(descriptor)
    if len(calls) == 2 + 2 * shard:
      raise OSError(errno.ENOSPC, "No space left on device")
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(errors.DataError, match=r"No space left.*resumes there"):
    codes_lib.write(tmp_path / "codes", _records, _META)
  monkeypatch.setattr(os, "fsync", fsync)
  assert not (tmp_path / "codes").exists()
  assert not list((tmp_path / "codes.partial").glob("*.tmp"))
  _check(codes_lib.write(tmp_path / "codes", _records, _META))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_inside_the_record_writer_is_reported(
  tmp_path, monkeypatch
):
  class Full(codes_lib.array_record_module.ArrayRecordWriter):
    def __init__(self, _, options):
      super().__init__("/dev/full", options)

  monkeypatch.setattr(codes_lib.array_record_module, "ArrayRecordWriter", Full)
  with pytest.raises(errors.DataError, match="No space left"):
    codes_lib.write(tmp_path / "codes", _records, _META)
  monkeypatch.undo()
  _check(codes_lib.write(tmp_path / "codes", _records, _META))


@pytest.mark.parametrize(
  ("field", "value"), [("tokenizer", "others"), ("source", "others")]
)
def test_another_tokenizer_or_other_data_are_refused(tmp_path, field, value):
  directory = tmp_path / "codes"
  codes_lib.write(directory, _records, _META)
  foreign = dataclasses.replace(_META, **{field: value})
  said = f"another {field}.*lavit tokenize"
  with pytest.raises(errors.DataError, match=said):
    codes_lib.write(directory, _records, foreign)
  with pytest.raises(errors.DataError, match=said):
    codes_lib.resume_point(directory, foreign)
  _check(codes_lib.CodeCache.load(directory))


def test_an_unfinished_cache_of_another_tokenizer_is_refused(tmp_path):
  with pytest.raises(
    errors.DataError,
    match=r"2 images came .* 4 on: expected 4 of 10",
  ):
    codes_lib.write(
      tmp_path / "codes",
      lambda first, stop: _records(first, min(stop, 6)),
      _META,
    )
  foreign = dataclasses.replace(_META, tokenizer="others")
  with pytest.raises(errors.DataError, match="another tokenizer"):
    codes_lib.write(tmp_path / "codes", _records, foreign)


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(errors.DataError, match="no code cache"):
    codes_lib.write(tmp_path, _records, _META)
  assert (tmp_path / "thesis.txt").exists()


def test_a_missing_cache_points_at_lavit_tokenize(tmp_path):
  with pytest.raises(
    errors.DataError, match=r"holds no code cache.*lavit tokenize"
  ):
    codes_lib.CodeCache.load(tmp_path / "codes")


_ALL = np.ones(9, bool)


@pytest.mark.parametrize(
  ("record", "said"),
  [
    ((1, _ALL, np.zeros(9, int)), "Image 1 came where 0 was due"),
    ((0, np.ones(8, bool), np.zeros(8, int)), r"keep \(8,\)"),
    ((0, _ALL, np.zeros(8, int)), r"codes \(8,\)"),
    ((0, ~_ALL, np.zeros(0, int)), "at least one"),
    ((0, _ALL, np.full(9, 100)), "codes from 100 to 100"),
    ((0, _ALL, np.full(9, -1)), "codes from -1"),
  ],
)
def test_records_that_do_not_fit_are_refused(tmp_path, record, said):
  meta = dataclasses.replace(_META, num_images=1)
  with pytest.raises(errors.DataError, match=said):
    codes_lib.write(tmp_path / "codes", lambda *_: [record], meta)
  assert not (tmp_path / "codes").exists()


def _spoil_shard(directory):
  path = directory / "codes-00001.array_record"
  path.write_bytes(path.read_bytes()[:100])


def _spoil_counts(directory):
  np.save(directory / "counts.npy", np.zeros(3, np.int32))


def _empty_counts(directory):
  (directory / "counts.npy").write_bytes(b"")


def _spoil_meta(directory):
  (directory / "meta.json").write_text("{")


def _spoil_format(directory):
  path = directory / "meta.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


def _drop_shard(directory):
  (directory / "codes-00001.array_record").unlink()


@pytest.mark.parametrize(
  "spoil",
  [
    _spoil_shard,
    _spoil_counts,
    _empty_counts,
    _spoil_meta,
    _spoil_format,
    _drop_shard,
  ],
)
def test_a_damaged_cache_is_refused(tmp_path, spoil):
  codes_lib.write(tmp_path / "codes", _records, _META)
  spoil(tmp_path / "codes")
  with pytest.raises(errors.DataError, match=r"codes is damaged.*again"):
    codes_lib.CodeCache.load(tmp_path / "codes")


def test_an_index_out_of_range_is_an_index_error(tmp_path):
  made = codes_lib.write(tmp_path / "codes", _records, _META)
  for i in (-1, 10):
    with pytest.raises(IndexError, match=f"image {i} of 10"):
      made.codes(i)


def test_image_fingerprints_are_compared_where_both_sides_have_one(tmp_path):
  folder = tmp_path / "a"
  known = dataclasses.replace(_META, pictures="these")
  other = dataclasses.replace(_META, pictures="others")
  codes_lib.write(folder, _records, known)
  for step in (
    lambda: codes_lib.write(folder, _records, other),
    lambda: codes_lib.resume_point(folder, other),
  ):
    with pytest.raises(errors.DataError, match=r"images \(these, here others"):
      step()
  codes_lib.write(folder, _records, _META)  # no fingerprint of images
  # A cache of an earlier version loads and keeps its digest.
  meta = json.loads((folder / "meta.json").read_text())
  del meta["pictures"]
  (folder / "meta.json").write_text(json.dumps(meta))
  old = codes_lib.CodeCache.load(folder)
  not_compared = ("data", "model", "shard_size")
  compared = {k: v for k, v in meta.items() if k not in not_compared}
  digest = hashlib.sha256(json.dumps(compared, sort_keys=True).encode())
  digest.update(np.ascontiguousarray(old.counts))
  assert old.fingerprint() == digest.hexdigest()[:32]


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_a_kill_before_the_last_rename_loses_nothing(
  tmp_path, monkeypatch, kept
):
  """At that moment `kept` of the journal's files are deleted already."""
  unlink, left, folder = pathlib.Path.unlink, [kept], tmp_path / "codes"

  def killed(path, missing_ok=False):
    if path.suffix in (".npy", ".json"):
      if not left[0]:
        raise KeyboardInterrupt
      left[0] -= 1
    unlink(path, missing_ok)

  def dies(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "unlink", killed)
    if kept == 4:
      patch.setattr(os, "replace", _replacing(folder, os.replace, dies))
    with pytest.raises(KeyboardInterrupt):
      codes_lib.write(folder, _records, _META)
  assert not folder.exists()
  assert codes_lib.resume_point(folder, _META) == 10
  other = dataclasses.replace(_META, source="others")
  with pytest.raises(errors.DataError, match="another source"):
    codes_lib.write(folder, _records, other)
  _check(codes_lib.write(folder, dies, _META))
  left = {p.suffix for p in folder.iterdir() if p.name.startswith("codes-")}
  assert left == {".array_record"}
  assert not (folder / "begun.json").exists()


def _replacing(folder, replace, otherwise):
  """Returns os.replace, except for a rename to the folder itself."""
  return lambda a, b: otherwise() if b == folder else replace(a, b)
