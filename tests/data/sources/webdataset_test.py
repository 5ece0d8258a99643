"""Tar archives as a Source: in place, split, into a packed batch."""

import os
import pathlib
import threading

import numpy as np
import pytest

from lavit_jax.core import errors, image_io, vocabulary
from lavit_jax.data import contents, examples
from lavit_jax.data.batching import pipeline
from lavit_jax.data.images import image_bytes
from lavit_jax.data.indexes import stored
from lavit_jax.data.sources import kinds, webdataset
from tests.data import fakes
from tests.data.indexes import tars
from tests.train import fake_gcs


@pytest.fixture(autouse=True)
def _indexes(tmp_path, monkeypatch):
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "kept"))


@pytest.fixture
def folder(tmp_path):
  """Three archives of four samples, and one with all that happens."""
  tars.shards(tmp_path / "data", 3)
  files = [
    *tars.sample("x1"),
    *tars.sample("x2", meta={"caption": "from json"}),
    ("x3.jpg", b"no image"),
    ("x3.txt", b"a caption"),
  ]
  tars.write(tmp_path / "data" / "odd.tar", files)
  return tmp_path / "data"


def config(path, **fields):
  return dict(kind="webdataset", path=str(path), image_size=16, seed=0) | fields


def test_samples_are_images_with_captions(folder):
  source = webdataset.WebDatasetSource(folder, 16)
  assert source.num_images == 15
  assert source.image_key(5) == "00001.tar/000005"
  assert source.captions(5) == ["image 5"]
  assert source.captions(12) == []
  assert source.captions(13) == ["from json"]
  expected = image_io.to_uint8(image_io.load(tars.jpeg(5)), 16)
  np.testing.assert_array_equal(source.image(5), expected)
  assert source.encoded(5) == tars.jpeg(5)
  with pytest.raises(image_io.ImageError, match=r"odd\.tar/x3"):
    source.image(14)
  assert source.tasks() == ("image_text", "text_image")
  assert source.num_examples("image_text") == 14  # x1 has no caption
  assert source.num_examples("vqa") == 0
  example = source.example("text_image", 12)
  assert example.key == "odd.tar/x2"
  assert example.parts == (
    examples.TextPart("from json"),
    examples.ImagePart(13, write=True),
  )


def test_splits_divide_the_samples_whatever_else_there_is(folder):
  names = {}
  for split in ("all", "train", "held_out"):
    source = webdataset.WebDatasetSource(
      folder, 16, split=split, held_out_share=0.4
    )
    names[split] = [source.image_key(i) for i in range(source.num_images)]
  assert sorted(names["train"] + names["held_out"]) == names["all"]
  assert names["train"]
  assert names["held_out"]
  some = webdataset.WebDatasetSource(
    folder / "00001.tar", 16, split="held_out", held_out_share=0.4
  )
  for i in range(some.num_images):
    assert some.image_key(i) in names["held_out"]
  with pytest.raises(errors.ConfigError, match="split='test'"):
    webdataset.WebDatasetSource(folder, 16, split="test")


def test_digests_change_with_what_they_cover(folder):
  def digests():
    source = webdataset.WebDatasetSource(folder, 16)
    return (
      examples.fingerprint(source),
      contents.of(source),
      image_bytes.of(source),
    )

  before = digests()
  assert digests() == before
  files = [
    f for k in range(4) for f in tars.sample(f"{k:06d}", "other", seed=k)
  ]
  tars.write(folder / "00000.tar", files)  # the same images, other captions
  names, texts, _ = digests()
  assert names == before[0]
  assert texts != before[1]
  files = [
    f for k in range(4) for f in tars.sample(f"{k:06d}", "other", seed=9)
  ]
  tars.write(folder / "00000.tar", files)  # the same captions, other images
  assert digests()[1] == texts
  assert digests()[2] != before[2]
  files = tars.sample("new", "other")
  tars.write(folder / "00000.tar", files)
  assert len({names, before[0], digests()[0]}) == 2


def test_bad_samples_are_counted_and_too_many_are_refused(tmp_path, caplog):
  files = [
    f for k in range(30) for f in tars.sample(f"{k:03d}", "fine", seed=k)
  ]
  files += [("900.txt", b"no image"), ("901.txt", b"no image")]
  tars.write(tmp_path / "a.tar", files)
  path = tmp_path / "a.tar"
  with pytest.raises(errors.DataError, match=r"2 of 32 samples.*a\.tar/900"):
    webdataset.WebDatasetSource(path, 16)
  source = webdataset.WebDatasetSource(path, 16, limit_share=0.1)
  assert (source.faults.seen, source.faults.bad) == (32, 2)
  assert source.faults.reasons["a.tar/901"] == "has no image"
  assert "skipped 2 from samples of a.tar, such as a.tar/900" in caplog.text


def test_an_archive_that_is_cut_off_is_named(folder, caplog):
  path = folder / "00001.tar"
  path.write_bytes(path.read_bytes()[:1500])
  webdataset.WebDatasetSource(folder, 16, limit_share=0.5)
  assert "1 of 4 archives are cut off or broken, such as" in caplog.text
  assert str(path) in caplog.text


def test_an_empty_archive_is_refused(folder):
  (folder / "00001.tar").write_bytes(b"")
  with pytest.raises(errors.DataError, match=r"00001\.tar is an empty file"):
    webdataset.WebDatasetSource(folder, 16)


def test_words_that_are_no_captions_are_named(tmp_path, caplog):
  path = tmp_path / "a.tar"
  meta = {"text": "words", "url": "http://x", "width": 3}
  tars.write(path, tars.sample("1", meta=meta))
  assert webdataset.WebDatasetSource(path, 16).tasks() == ()
  assert "no sample has a caption" in caplog.text
  assert "the json of a.tar/1 has ['text']" in caplog.text


def test_archives_without_samples_are_refused(tmp_path):
  tars.write(tmp_path / "a.tar", [])
  with pytest.raises(errors.DataError, match="no usable sample"):
    webdataset.WebDatasetSource(tmp_path / "a.tar", 16)


def test_an_archive_that_is_cut_while_it_is_read_is_named(folder):
  source = webdataset.WebDatasetSource(folder, 16)
  with open(folder / "00002.tar", "r+b") as file:
    file.truncate(600)
  with pytest.raises(image_io.ImageError, match=r"00002\.tar/000008.*changed"):
    source.image(8)


def test_an_archive_that_is_written_anew_while_it_is_read_is_named(folder):
  """A caption must not come with the image of another archive."""
  source = webdataset.WebDatasetSource(folder, 16)
  source.captions(9)
  files = [
    f for k in range(8, 12) for f in tars.sample(f"{k:06d}", "x", seed=k)
  ]
  tars.write(folder / "00002.tar", files)
  with pytest.raises(image_io.ImageError, match="has changed"):
    source.image(9)
  fresh = webdataset.WebDatasetSource(folder, 16)
  assert fresh.captions(9) == ["x"]


def test_an_index_that_is_gone_before_its_first_use_is_named(folder):
  source = webdataset.WebDatasetSource(folder, 16)
  for file in stored.folder().glob("*/00002.tar.index"):
    file.unlink()
  with pytest.raises(errors.DataError, match="Start again: it is made anew"):
    source.captions(9)
  assert webdataset.WebDatasetSource(folder, 16).captions(9) == ["image 9"]


def test_an_archive_replaced_before_its_first_use_is_named(folder):
  source = webdataset.WebDatasetSource(folder, 16)
  files = [
    f for k in range(8, 12) for f in tars.sample(f"{k:06d}", "x", seed=k)
  ]
  tars.write(folder / "new", files)
  os.replace(folder / "new", folder / "00002.tar")
  with pytest.raises(image_io.ImageError, match="has changed"):
    source.image(9)


def test_threads_read_more_archives_than_stay_open(folder, monkeypatch):
  monkeypatch.setattr(webdataset, "_OPEN", 1)
  source = webdataset.WebDatasetSource(folder, 16)
  expected, wrong = [tars.jpeg(i) for i in range(12)], []

  def read(seed):
    for i in np.random.default_rng(seed).integers(0, 12, 100):
      if source.encoded(i) != expected[i]:
        wrong.append(i)

  threads = [threading.Thread(target=read, args=(s,)) for s in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_config_builds_both_splits(folder, caplog):
  train, held_out = kinds.pair(config(folder / "{00000..00002}.tar"))
  assert train.num_images + held_out.num_images == 12
  assert "nine tenths by hash" in kinds.describe(config(folder), "train", train)
  assert not caplog.text
  apart = config(
    folder / "0000[01].tar", held_out_path=str(folder / "00002.tar")
  )
  train, held_out = kinds.pair(apart)
  assert (train.num_images, held_out.num_images) == (8, 4)
  assert not caplog.text
  apart["held_out_path"] = str(folder / "0000[12].tar")
  (folder / "link").symlink_to(folder)
  apart["held_out_path"] = str(folder / "link" / "0000[12].tar")
  kinds.pair(apart)
  assert "4 of 8 held-out samples are in the training data" in caplog.text
  with pytest.raises(errors.ConfigError, match="path is empty"):
    kinds.build(config(""), "train")
  assert kinds.kind_of(folder) == "webdataset"
  assert kinds.kind_of("my.jsonl") == "jsonl"


def test_samples_are_packed_into_batches(folder):
  """A bad image loses its weight, and nothing else."""
  source = webdataset.WebDatasetSource(folder, fakes.SIZE)
  text = fakes.Words()
  batches = pipeline.packed_rows(
    source,
    fakes.Cache([3] * source.num_images),
    text,
    vocabulary.Vocabulary(text.size, fakes.CODES),
    mixture={"image_text": 1, "text_image": 1},
    length=64,
    slots=4,
    batch_size=2,
    window=28,
    limit_share=0.2,
  )
  words, reads = set(), 0
  for k in range(8):
    batch = batches[k]
    words |= set(batch["tokens"].ravel().tolist())
    reads += int(batch["keep"].any(axis=-1).sum())
  assert reads >= 14
  captions = [f"image {i}" for i in range(12)] + ["from json"]
  assert {i for text_ in captions for i in text.encode(text_)} <= words
  assert batches.faults[1].names.keys() == {"odd.tar/x3"}


def test_archives_of_an_object_store_are_read_in_place(folder, monkeypatch):
  with fake_gcs.serving(monkeypatch) as store:
    fake_gcs.upload(store, folder, "gs://bucket/data")
    source = webdataset.WebDatasetSource("gs://bucket/data", 16)
    here = webdataset.WebDatasetSource(folder, 16)
    for i in (0, 5, 13):
      assert source.image_key(i) == here.image_key(i)
      assert source.captions(i) == here.captions(i)
      assert source.encoded(i) == here.encoded(i)
    assert examples.fingerprint(source) == examples.fingerprint(here)
    some = webdataset.WebDatasetSource("gs://bucket/data/0000{1,2}.tar", 16)
    assert some.num_images == 8
    store.rm_file("/bucket/data/00001.tar")
    with pytest.raises(errors.DataError, match=r"no archive gs://.*00001\.tar"):
      webdataset.WebDatasetSource("gs://bucket/data/0000{1,2}.tar", 16)


@pytest.mark.shared
@pytest.mark.skipif(
  not os.environ.get("LAVIT_SHARED"), reason="needs LAVIT_SHARED"
)
def test_real_archives_are_read():
  root = pathlib.Path(os.environ["LAVIT_SHARED"]) / "data" / "F_webdataset"
  source = webdataset.WebDatasetSource(root / "cc3m_style", 32)
  assert source.num_images == source.num_examples("image_text") == 119
  assert source.captions(0)[0].startswith("A big burly grizzly bear")
  for i in range(0, 119, 10):
    assert source.image(i).shape == (32, 32, 3)
