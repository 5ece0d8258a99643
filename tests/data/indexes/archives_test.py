"""Paths that name archives: folders, braces, patterns."""

import os

import pytest

from lavit_jax.core import errors
from lavit_jax.data.indexes import archives
from tests.data.indexes import tars


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "other.txt").write_text("")
  return tars.shards(tmp_path, 12, samples=1)


@pytest.mark.parametrize(
  ("pattern", "numbers"),
  [
    ("", range(12)),
    ("/", range(12)),
    ("/00003.tar", [3]),
    ("/{00002..00004}.tar", [2, 3, 4]),
    ("/000{09..11}.tar", [9, 10, 11]),
    ("/0000{5,1}.tar", [5, 1]),
    ("/0000[12].tar", [1, 2]),
    ("/0001*.tar", [10, 11]),
    ("/0000{4..2}.tar", [4, 3, 2]),
  ],
)
def test_archives_are_named(folder, pattern, numbers):
  found = archives.of(f"{folder}{pattern}")
  assert [path.name for path in found] == [f"{n:05d}.tar" for n in numbers]
  assert archives.is_named(f"{folder}{pattern}")


def test_files_of_another_suffix_are_named_alike(folder):
  for name in ("b.parquet", "a.PARQUET", "c.parquet.crc"):
    (folder / name).write_text("")
  of = lambda path: archives.of(path, ".parquet", "Parquet file")
  assert [p.name for p in of(folder)] == ["a.PARQUET", "b.parquet"]
  assert [p.name for p in of(f"{folder}/{{b,c}}*")] == [
    "b.parquet",
    "c.parquet.crc",
  ]
  with pytest.raises(errors.DataError, match=r"no Parquet file.*31}\.parquet'"):
    of(f"{folder}/*.zip")


def test_what_a_folder_holds_beside_is_named_once(folder, caplog):
  (folder / "00003.parquet").write_text("")  # img2dataset's own
  archives.of(folder)
  assert not caplog.records
  for name in ("more.jsonl", "table.parquet"):
    (folder / name).write_text("")
  tars.shards(folder / "deeper", 1)
  archives._check_others.cache_clear()
  for _ in range(2):
    assert len(archives.of(folder)) == 12
  (said,) = [record.getMessage() for record in caplog.records]
  assert "only .tar files in it are read, not more.jsonl and 2 more" in said


def test_archives_in_folders_are_named(folder, caplog):
  tars.shards(folder / "deeper", 1)
  archives.of(folder)
  assert "not deeper/. Name others by a pattern, such as" in caplog.text
  assert f"{folder}/*/*.tar" in caplog.text


def test_a_compressed_archive_among_others_is_refused(folder):
  (folder / "00003.tar.gz").write_bytes(b"")  # that of one which is unpacked
  assert len(archives.of(folder)) == 12
  (folder / "00012.tar.gz").write_bytes(b"")
  archives._check_others.cache_clear()
  with pytest.raises(errors.DataError, match=r"00012\.tar\.gz is compressed"):
    archives.of(folder)


@pytest.mark.parametrize("suffix", archives.COMPRESSED)
def test_compressed_archives_alone_are_refused_as_such(tmp_path, suffix):
  (tmp_path / f"0{suffix}").write_bytes(b"")
  with pytest.raises(errors.DataError, match="is compressed, and can only"):
    archives.of(tmp_path)


def test_a_name_with_brackets_is_itself(tmp_path):
  path = tars.write(tmp_path / "a{1}[2].tar", tars.sample("1"))
  assert archives.of(path) == [path]


@pytest.mark.parametrize(
  ("pattern", "says"),
  [
    ("/*.zip", "names no tar archive"),
    ("/{00000,00000}.tar", "twice"),
    ("/{0..99999999}.tar", "more than 1000000"),
    ("/{0..999}{0..999}{0..9}.tar", "more than 1000000"),
  ],
)
def test_what_names_none_is_refused(folder, pattern, says):
  with pytest.raises(errors.DataError, match=says):
    archives.of(f"{folder}{pattern}")


def test_other_data_are_not_archives(tmp_path):
  assert not archives.is_named("my.jsonl")
  assert not archives.is_named("shapes")
  assert not archives.is_named("gs://b/parts*.jsonl")
  (tmp_path / "plain").write_text('{"image": "a.jpg"}')
  assert not archives.is_named(tmp_path / "plain")
  for name in ("gs://b/{0..3}.tar", "d/*", "a.tar.gz", "d/{a,b}/", tmp_path):
    assert archives.is_named(name)
  tars.write(tmp_path / "unnamed", tars.sample("1"))
  assert archives.is_named(tmp_path / "unnamed")


def test_only_files_of_a_folder_are_archives(folder):
  (folder / "folder.tar").mkdir()
  os.mkfifo(folder / "pipe.tar")
  tars.write(folder / "LAST.TAR", tars.sample("1"))
  names = [path.name for path in archives.of(folder)]
  assert len(names) == 13
  assert names[-1] == "LAST.TAR"


def test_braces_of_names_and_letters(tmp_path):
  root = tmp_path / "p [1] {x}"
  root.mkdir()
  for letter in "abc":
    tars.write(root / f"{letter}.tar", tars.sample("1"))
  escaped = f"{tmp_path}/p [[]1] {{x}}"
  for pattern in ("*.tar", "{a..c}.tar", "[abc].tar"):
    found = archives.of(f"{escaped}/{pattern}")
    assert [p.name for p in found] == ["a.tar", "b.tar", "c.tar"]
  assert len(archives.of(root)) == 3
  with pytest.raises(errors.DataError, match="braces in braces"):
    archives.of("d/{a,{b,c}}.tar")
