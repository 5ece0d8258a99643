"""Parts of tables: splits, numbers, what is kept, what a footer says."""

import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from lavit_jax.core import errors
from lavit_jax.data.indexes.tables import decoded, numbers, splits, tables
from lavit_jax.data.indexes.tables.parquet import footer, thrift
from lavit_jax.data.records import columns
from tests.data.indexes import table_files

HALF = 1 << 31
NO_IMAGES = np.zeros(0, np.int64), np.zeros(0, np.uint32)


def held_out(hashes, share=0.5, joined=NO_IMAGES, own=None, places=()):
  hashes = np.array(hashes, np.uint32)
  if own is None:
    own = np.zeros(len(hashes), bool)
  places = np.array(places)
  return splits.held_out(
    hashes, joined, (np.array(own), lambda rows: places[rows]), share
  ).tolist()


def joined(*pairs):
  rows, images = zip(*pairs, strict=True)
  return np.array(rows, np.int64), np.array(images, np.uint32)


def test_rows_are_held_out_by_their_hashes():
  assert held_out([1, HALF - 1, HALF, 2**32 - 1]) == [True, True, False, False]
  assert held_out([5, 9, 7], share=0) == [False] * 3
  assert held_out([HALF, HALF + 9, HALF + 1]) == [True, False, False]  # of few
  assert held_out([HALF]) == [False]


def test_rows_that_share_any_image_are_chosen_together():
  """0, 1 and 2 by a chain of images; 3 has its image alone."""
  low, high = 1, 2**32 - 1
  chain = joined((0, high), (0, 7), (1, 8), (1, 7), (2, 8), (2, low))
  assert held_out([high, 8, 8, 9], share=0.9, joined=chain) == [True] * 4
  other = joined((0, high), (0, high - 1), (1, high - 1), (1, high - 2))
  hashes = [high, high - 1, 3, high - 2, 4]
  assert held_out(hashes, joined=other) == [False, False, True, False, True]


def test_of_many_rows_with_one_image_all_are_trained_on(caplog):
  hashes = [1] * 30 + list(range(2**32 - 70, 2**32))
  assert not any(held_out(hashes, share=0.1)[:30])
  assert "30 of 100 rows are joined" in caplog.text
  # A name of images that are in the table need not be theirs alone.
  places = [1 if i < 15 else 2**32 - 1 for i in range(100)]
  own = [i < 30 for i in range(100)]
  held = held_out(hashes, share=0.1, own=own, places=places)
  assert held == [i < 15 for i in range(100)]


def test_long_chains_of_images_take_little_time():
  count = 20_000
  images = np.arange(count + 1, dtype=np.uint32)[::-1]
  rows = np.repeat(np.arange(count), 2)
  pairs = np.stack([images[:-1], images[1:]], 1).ravel()
  begun = time.monotonic()
  held = splits.held_out(
    images[:-1].copy(),
    (rows, pairs),
    (np.zeros(count, bool), lambda rows: rows),
    0.6,
  )
  assert held.all()  # the least hash leads all of them
  assert time.monotonic() - begun < 5


@pytest.mark.parametrize("counts", [[1] * 5, [0] * 5, [2, 0, 0, 1, 3], []])
def test_things_are_found_in_their_rows(counts):
  found = numbers.Counts(np.array(counts, np.uint16))
  expected = [(r, k) for r, count in enumerate(counts) for k in range(count)]
  assert [found.find(i) for i in range(found.total)] == expected
  for row in range(len(counts)):
    assert found.start(row) == sum(counts[:row])
  with pytest.raises(IndexError):
    found.find(found.total)


def test_rows_are_found_in_their_blocks():
  blocks = [np.array(some) for some in ([], [0, 3], [2, 0, 1], [], [4, 0])]
  places = numbers.Places(["a", "b", "c", "d", "e"], blocks)
  assert places.starts.tolist() == [0, 0, 3, 6, 6, 10]
  expected = [
    (table, block, j)
    for table, some in enumerate(blocks)
    for block, count in enumerate(some.tolist())
    for j in range(count)
  ]
  assert [places.find(row) for row in range(10)] == expected
  assert [places.name(row) for row in (0, 4, 9)] == ["b:0", "c:1", "e:3"]


def test_a_value_is_made_once_and_dropped_when_others_need_the_room():
  kept, made = decoded.Decoded(10, len), []

  def get(key, size):
    return kept.get(key, lambda: (made.append(key), "x" * size)[1])

  for key in (1, 2, 1, 2):
    assert get(key, 5) == "xxxxx"
  assert made == [1, 2]
  get(1, 5)
  get(3, 5)  # for which 2 goes, the one used first
  get(1, 5)
  get(2, 5)
  assert made == [1, 2, 3, 2]
  get(4, 99)  # too large, and yet kept until the next
  get(4, 99)
  assert made == [1, 2, 3, 2, 4]


def test_threads_that_ask_for_one_value_wait_for_it():
  kept, made, found = decoded.Decoded(10, len), [], []
  begin = threading.Barrier(4)

  def make():
    made.append(1)
    time.sleep(0.05)
    if len(made) == 1:
      raise ValueError("the first time")
    return "x"

  def read():
    begin.wait()
    try:
      found.append(kept.get("key", make))
    except ValueError:
      found.append("error")

  threads = [threading.Thread(target=read) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == ["error"] * 4  # which is not kept
  assert kept.get("key", make) == "x"
  assert len(made) == 2


def test_a_footer_says_what_pyarrow_says_of_it(tmp_path):
  columns_ = {
    "image": [*table_files.embedded(5), None],
    "images": [table_files.embedded(2), [], None] * 2,
    "caption": ["a", None, "c"] * 2,
    "number": list(range(6)),
  }
  for options in ({}, {"compression": "zstd", "use_dictionary": False}):
    path = table_files.parquet(
      tmp_path / "a.parquet",
      columns_,
      rows=4,
      image="image",
      images="images",
      options=options,
    )
    groups = footer.groups_of(footer.data_of(tables.Bytes(path)))
    theirs = pq.read_metadata(path)
    assert len(groups) == theirs.num_row_groups == 2
    for g, group in enumerate(groups):
      assert group.rows == theirs.row_group(g).num_rows
      for c, chunk in enumerate(group.chunks):
        other = theirs.row_group(g).column(c)
        assert chunk.count == other.num_values
        assert chunk.nulls == other.statistics.null_count
        assert chunk.size[0] == other.total_compressed_size
        assert chunk.size[1] == other.total_uncompressed_size
        first = other.dictionary_page_offset or other.data_page_offset
        assert chunk.start == first


@pytest.mark.parametrize("data", [b"", b"\x15", b"\x4c", b"\xff" * 50])
def test_what_is_no_footer_is_odd(data):
  with pytest.raises(thrift.Odd):
    footer.groups_of(data)


def test_a_layout_is_chosen_by_types_before_names():
  text = lambda name: columns.Column(name, "text")
  image = lambda name: columns.Column(name, "image")
  chosen = columns.layout([text("file_name"), image("jpg"), text("text")], "t")
  assert chosen.images["image"].name == "jpg"
  assert chosen.fields == {"text": "text"}
  assert chosen.unread == ("file_name",)
  several = columns.Column("images", "image", many=True)
  chosen = columns.layout([image("image"), several, text("caption")], "t")
  assert list(chosen.images) == ["image"]
  talk = columns.Column("messages", "record", many=True)
  chosen = columns.layout([image("image"), several, talk], "t")
  assert list(chosen.images) == ["image", "images"]
  chosen = columns.layout([image("mask"), several, text("caption")], "t")
  assert list(chosen.images) == ["images"]
  with pytest.raises(errors.DataError, match=r"no column that is read; .*'a'"):
    columns.layout([columns.Column("a", "number")], "t")
