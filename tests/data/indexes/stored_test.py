"""Indexes are made once, kept, and made again when an archive changes."""

import json
import os

import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.data.indexes import archives, stored
from tests.data.indexes import tars


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
  """The folder of the indexes."""
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "kept"))
  return tmp_path / "kept"


@pytest.fixture
def made(monkeypatch):
  """The archives whose index is made, by name."""
  made, real = [], stored.make
  monkeypatch.setattr(
    stored, "make", lambda path: (made.append(path.name), real(path))
  )
  return made


def names(index, stop):
  """The first bytes of the names in an index on the disk."""
  start = index.strings.names
  return index.strings.file.read_bytes()[start : start + stop].decode()


def test_an_index_is_made_once(tmp_path, made):
  paths = archives.of(tars.shards(tmp_path, 3))
  first, second = stored.of(paths), stored.of(paths)
  assert made == ["00000.tar", "00001.tar", "00002.tar"]
  for one, two in zip(first, second, strict=True):
    np.testing.assert_array_equal(one.samples.columns, two.samples.columns)
  assert names(second[1], 24) == "000004000005000006000007"


def test_an_archive_that_changed_is_indexed_again(tmp_path, made):
  paths = archives.of(tars.shards(tmp_path, 2))
  stored.of(paths)
  tars.write(paths[1], tars.sample("new", "other"))
  _, index = stored.of(paths)
  assert made == ["00000.tar", "00001.tar", "00001.tar"]
  assert names(index, 3) == "new"


@pytest.mark.parametrize("damage", ["cut", "bit", "head", "empty"])
def test_a_damaged_index_is_made_again(tmp_path, kept, made, damage, caplog):
  paths = archives.of(tars.shards(tmp_path, 1))
  (before,) = stored.of(paths)
  (file,) = kept.glob("*/*.index")
  data = bytearray(file.read_bytes())
  if damage == "bit":
    data[data.index(b"\n") + 9] ^= 1
  file.write_bytes(
    {"cut": data[:-9], "bit": data, "head": b"{" + data, "empty": b""}[damage]
  )
  (after,) = stored.of(paths)
  assert len(made) == 2
  assert "damaged" in caplog.text
  np.testing.assert_array_equal(before.samples.columns, after.samples.columns)


def test_many_archives_are_indexed_by_processes(tmp_path, capsys):
  paths = archives.of(tars.shards(tmp_path, 9, samples=1))
  indexes = stored.of(paths)
  assert [names(index, 6) for index in indexes] == [
    f"{i:06d}" for i in range(9)
  ]
  assert "index 9 archives" in capsys.readouterr().err
  # One that cannot be read ends the call; what is made stays.
  other = tars.shards(tmp_path / "more", 9, samples=1)
  (other / "00008.tar").write_bytes(b"no archive" * 100)
  with pytest.raises(errors.DataError, match=r"00008.tar is no tar archive"):
    stored.of(archives.of(other), quiet=True)


def test_processes_read_no_module_of_the_working_folder(tmp_path, monkeypatch):
  paths = archives.of(tars.shards(tmp_path / "data", 9, samples=1))
  (tmp_path / "json.py").write_text("raise RuntimeError")
  monkeypatch.chdir(tmp_path)
  assert len(stored.of(paths, quiet=True)) == 9


def test_an_archive_of_the_same_size_and_time_is_indexed_again(tmp_path, made):
  path = tars.write(tmp_path / "a.tar", tars.sample("1", "one"))
  os.utime(path, (1000, 1000))
  stored.of([path])
  tars.write(tmp_path / "b.tar", tars.sample("2", "two"))
  os.replace(tmp_path / "b.tar", path)
  os.utime(path, (1000, 1000))
  (index,) = stored.of([path])
  assert len(made) == 2
  assert names(index, 1) == "2"


def test_long_and_odd_paths_have_an_index(tmp_path):
  odd = tmp_path / b"\xe9".decode(errors="surrogateescape")
  odd.mkdir()
  paths = [tars.write(odd / f"{'n' * 240}.tar", tars.sample("1"))]
  for _ in range(2):
    (index,) = stored.of(paths)
    assert names(index, 1) == "1"


def test_bad_places_are_named(tmp_path, monkeypatch):
  with pytest.raises(errors.DataError, match="There is no archive"):
    stored.of([tmp_path / "none.tar"])
  paths = archives.of(tars.shards(tmp_path, 1))
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "file" / "x"))
  with pytest.raises(errors.DataError, match="Set LAVIT_INDEXES"):
    stored.of(paths)


def test_an_index_is_small(tmp_path, kept):
  """What is read of a sample is a row of columns."""
  (index,) = stored.of(archives.of(tars.shards(tmp_path, 1, samples=50)))
  assert index.samples.columns.itemsize <= 40
  assert not index.samples.names
  (file,) = kept.glob("*/*.index")
  assert os.path.getsize(file) < 1000 + 50 * (
    index.samples.columns.itemsize + 6 + 9  # the name, the caption
  )
  head = json.loads(file.open("rb").readline())
  assert head["samples"] == 50
