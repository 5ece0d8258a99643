"""`lavit data prepare`: any source becomes shards, and reads back equal."""

import collections
import io
import itertools
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from lavit_jax.core import errors, vocabulary
from lavit_jax.data import contents, examples
from lavit_jax.data.batching import pipeline
from lavit_jax.data.caches import shards as cache_shards
from lavit_jax.data.sources import kinds, prepared
from lavit_jax.jobs.prepare import job, looks
from lavit_jax.jobs.prepare import plan as plan_lib
from tests.data import fakes
from tests.data.indexes import table_files, tars
from tests.jobs import here

_SMALL = plan_lib.Settings(images_per_shard=7, examples_per_shard=5)


@pytest.fixture(autouse=True)
def _indexes(tmp_path, monkeypatch):
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "kept"))


@pytest.fixture(autouse=True)
def _here(request, monkeypatch):
  """Runs what other processes do in this one, but where a test wants them."""
  if "processes" in request.node.name:
    return
  monkeypatch.setattr(looks, "CHUNK", 4)
  here.patch(monkeypatch)


def _prepare(data, out, settings=_SMALL, **kwargs):
  return job.prepare(str(data), out, settings=settings, quiet=True, **kwargs)


def _opened(path, kind=None, split="train", **fields):
  config = dict(
    kind=kind or kinds.kind_of(path), path=str(path), image_size=fakes.SIZE,
    seed=0, held_out_path=str(path),
  )  # fmt: skip
  return kinds.build(config | fields, split)


def _jsonl(folder, count=12):
  """Lines of every task, some of them about the same image."""
  folder.mkdir()
  for i in range(count):
    (folder / f"{i}.png").write_bytes(table_files.encoded(i))
  rows = [
    {"image": f"{i}.png", "captions": [f"image {i}", f"no {i}"]}
    for i in range(count)
  ]
  rows += [{"image": "0.png", "question": "what", "answer": "zero"}]
  edit = {"instruction": "x", "image": "2.png"}
  rows += [{"image": "1.png", "edits": [edit]}]
  image = lambda i: {"type": "image", "image": f"{i}.png"}
  end = {"type": "text", "text": "it", "end": True}
  rows += [{"messages": ["see", image(i), end, image(4)]} for i in (3, 5)]
  rows += [{"text": f"words {i}"} for i in range(9)]
  path = folder / "a.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _webdataset(folder):
  folder.mkdir()
  meta = {"similarity": 0.3, "caption": "x"}
  for s in range(2):
    files = [
      file
      for k in range(5)
      for file in tars.sample(
        f"{s}{k}", f"image {k}", seed=5 * s + k, meta=meta
      )
    ]
    tars.write(folder / f"{s}.tar", files)
  return folder


def _parquet(folder):
  return table_files.captioned(folder, 3)


def _hf(folder):
  columns = {"image": table_files.embedded(10), "label": [0, 1] * 5}
  return table_files.saved(folder, columns, image="image", label=["cat", "dog"])


def _obelics(folder):
  folder.mkdir()
  columns = {
    "images": [[None, table_files.encoded(i), None] for i in range(4)],
    "texts": [["One.", None, f"{i}."] for i in range(4)],
  }
  types = {"images": pa.list_(pa.binary())}
  table_files.parquet(folder / "a.parquet", columns, types)
  return folder


SOURCES = {
  "jsonl": _jsonl,
  "webdataset": _webdataset,
  "parquet": _parquet,
  "hf": _hf,
  "obelics": _obelics,
}


def _everything(source):
  """Images by name, and each example with these, of a source."""
  images = {
    source.image_key(i): (looks.encoded(source, i), source.captions(i))
    for i in range(source.num_images)
  }
  keyed = lambda part: (
    (source.image_key(part.image), part.write, part.weight, part.optional)
    if isinstance(part, examples.ImagePart)
    else part
  )
  found = {
    task: [
      tuple(map(keyed, source.example(task, i).parts))
      for i in range(source.num_examples(task))
    ]
    for task in source.tasks()
  }
  return images, found


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_reads_back_equal(tmp_path, name):
  path = SOURCES[name](tmp_path / "data")
  manifest = _prepare(path, tmp_path / "out")
  before, after = _opened(path), _opened(tmp_path / "out")
  assert isinstance(after, prepared.PreparedSource)
  assert after.tasks() == before.tasks()
  (images, found), (images2, found2) = map(_everything, (before, after))
  assert list(images.items()) == list(images2.items())
  assert found == found2
  assert manifest["images"] == before.num_images
  assert manifest["left_out"] == {}
  if isinstance(before, examples.HasFields):
    assert after.fields(3) == before.fields(3)
  np.testing.assert_array_equal(after.image(1), before.image(1))
  for protocol in (
    *(examples.Source, examples.HasEncodedImages, examples.HasFields),
    *(examples.HasStorage, examples.HasFingerprint, examples.HasContents),
  ):
    assert isinstance(after, protocol)
  assert not job.verify(tmp_path / "out")
  assert {p.name for p in (tmp_path / "out").iterdir()} == {
    *manifest["files"], prepared.MANIFEST,
  }  # fmt: skip
  # The same command finds it done; another is told.
  assert _prepare(path, tmp_path / "out") == manifest
  with pytest.raises(
    errors.DataError, match=r"other settings: .*side=0, here 3"
  ):
    _prepare(path, tmp_path / "out", plan_lib.Settings(side=3))
  filters = {"filters": {"min_chars": 3}}
  with pytest.raises(errors.DataError, match="filters=None, here"):
    job.prepare(path, tmp_path / "out", fields=filters, workers=1, quiet=True)


def test_prepared_data_become_batches(tmp_path):
  _prepare(_jsonl(tmp_path / "data"), tmp_path / "out")
  config = {"kind": "arrayrecord", "held_out_path": ""}
  train, held_out = (
    _opened(tmp_path / "out", split=split, **config)
    for split in ("train", "held_out")
  )
  names = [set(_everything(s)[0]) for s in (train, held_out)]
  assert not names[0] & names[1]
  assert len(names[0] | names[1]) == 12
  # What shares an image is on one side; the numbers of images are the side's.
  for source in (train, held_out):
    _everything(source)
  assert train.num_examples("document") in (0, 2)
  batches = pipeline.packed_rows(
    train,
    fakes.Cache([3] * train.num_images),
    fakes.Words(),
    vocabulary.Vocabulary(fakes.Words.size, fakes.CODES),
    mixture=dict.fromkeys(train.tasks(), 1.0),
    length=64,
    slots=4,
    batch_size=4,
    window=16,
  )
  for batch in itertools.islice(pipeline.iterate(batches, num_threads=2), 3):
    assert batch["keep"].any()


def _bytes_of(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
  path = _jsonl(tmp_path / "data")
  _prepare(path, tmp_path / "one", workers=1)
  _prepare(path, tmp_path / "three", workers=3)
  assert _bytes_of(tmp_path / "one") == _bytes_of(tmp_path / "three")


def test_an_interrupted_one_goes_on(tmp_path, monkeypatch):
  path = _jsonl(tmp_path / "data")
  _prepare(path, tmp_path / "whole")
  real, calls = job.pool.run, collections.Counter()

  def stopping(make, setup, items, **options):
    for answer in real(make, setup, items, **options):
      yield answer
      calls[make] += 1
      if sum(calls.values()) in stops:
        raise KeyboardInterrupt

  monkeypatch.setattr(job.pool, "run", stopping)
  stops = {1, 3, 4, 6, 8}
  for _ in range(len(stops)):
    with pytest.raises(KeyboardInterrupt):
      _prepare(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(errors.DataError, match=r"unfinished: give the same"):
      prepared.PreparedSource(tmp_path / "out", 4)
  _prepare(path, tmp_path / "out")
  assert _bytes_of(tmp_path / "out") == _bytes_of(tmp_path / "whole")
  assert sum(calls.values()) == 3 + 3 + 2 + 3  # each chunk and shard once


def test_other_data_do_not_go_on_where_some_were_begun(tmp_path, monkeypatch):
  path = _jsonl(tmp_path / "data")
  with monkeypatch.context() as patch:
    patch.setattr(job._Job, "_plan", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      _prepare(path, tmp_path / "out")
  with path.open("a") as file:
    file.write('{"text": "more"}\n')
  with pytest.raises(errors.DataError, match="made with other data: contents"):
    _prepare(path, tmp_path / "out")


def test_duplicates_leave_their_captions(tmp_path):
  path = _jsonl(tmp_path / "data")
  folder = path.parent
  shutil.copy(folder / "1.png", folder / "7.png")
  small = Image.open(io.BytesIO(table_files.encoded(3, size=(64, 64))))
  small.save(folder / "3.png")
  small.save(folder / "9.png", compress_level=1)
  with path.open("a") as file:
    file.write('{"text": "words 3"}\n')
  settings = lambda how: plan_lib.Settings(duplicates=how)
  manifest = _prepare(path, tmp_path / "exact", settings("exact"))
  assert manifest["left_out"] == {
    "same bytes as an earlier image": 1,
    "text that was there before": 1,
  }
  source = _opened(tmp_path / "exact")
  assert (source.num_images, source.num_examples("text")) == (11, 9)
  assert source.captions(1) == ["image 1", "no 1", "image 7", "no 7"]
  manifest = _prepare(path, tmp_path / "near", settings("near"))
  assert manifest["left_out"]["near-duplicate of an earlier image"] == 1
  source = _opened(tmp_path / "near")
  assert source.num_images == 10
  assert [p.image for p in source.example("document", 0).parts[1::2]] == [3, 4]


def test_bad_images_are_left_out_with_what_needs_them(tmp_path):
  path = _jsonl(tmp_path / "data", count=40)
  (path.parent / "2.png").write_bytes(b"no image")
  (path.parent / "39.png").unlink()
  manifest = _prepare(path, tmp_path / "out", fields={"limit_share": 0.1})
  assert manifest["left_out"] == {
    "cannot be read": 2,
    "an image of it is left out": 1,
  }
  text = (tmp_path / "out" / "bad.jsonl").read_text()
  bad = [json.loads(line) for line in text.splitlines()]
  assert [one["name"] for one in bad] == ["2.png", "39.png"]
  source = _opened(tmp_path / "out")
  assert source.num_images == 38
  assert source.num_examples("edit") == 0
  with pytest.raises(errors.DataError, match="2 of 40 images"):
    _prepare(path, tmp_path / "other", fields={"limit_share": 0.01})


def test_filters_and_smaller_images(tmp_path):
  path = _webdataset(tmp_path / "data")
  manifest = _prepare(
    path,
    tmp_path / "out",
    plan_lib.Settings(side=8, license="CC BY 4.0"),
    fields={"filters": {"pattern": "[0-3]$"}},
  )
  assert manifest["license"] == "CC BY 4.0"
  assert manifest["left_out"] == {
    "filters: images": 2,
    "filters: captions": 2,
  }
  source = _opened(tmp_path / "out")
  image = Image.open(io.BytesIO(source.encoded(0)))
  assert (image.size, image.format) == ((8, 12), "JPEG")


def _read_all(path):
  source = _opened(path, "arrayrecord", held_out_path="")
  _everything(source)
  for i in range(source.num_images):
    source.image(i)


@pytest.mark.parametrize(
  "name",
  ["images-00000-of-00002.npy", "images-00000-of-00002.array_record",
   "about-00001-of-00002.array_record", "manifest.json",
   "examples-00000-of-00003.array_record", "joined-00000-of-00003.npy"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_damaged_files_are_named(tmp_path, name, damage):
  _prepare(_jsonl(tmp_path / "data"), tmp_path / "out")
  path = tmp_path / "out" / name
  data = path.read_bytes()
  changed = {"cut": data[: len(data) // 2], "other": b"other" * 100}
  if damage == "gone":
    path.unlink()
  else:
    path.write_bytes(changed[damage])
  with pytest.raises(errors.LavitError, match=name.split("-", maxsplit=1)[0]):
    _read_all(tmp_path / "out")
  if name != "manifest.json":
    (said,) = job.verify(tmp_path / "out")
    assert said.startswith(name)


def test_contents_differ_where_words_do(tmp_path):
  path = _jsonl(tmp_path / "data")
  _prepare(path, tmp_path / "one")
  path.write_text(path.read_text().replace("words 3", "words x"))
  _prepare(path, tmp_path / "two")
  one, two = _opened(tmp_path / "one"), _opened(tmp_path / "two")
  assert contents.of(one) != contents.of(two)
  assert examples.fingerprint(one) == examples.fingerprint(two) != ""
  assert one.stored() == two.stored()


# What users do to it ----------------------------------------------------------


def _begun(path, out, monkeypatch, step="_write"):
  """An unfinished folder, as a kill leaves it."""
  with monkeypatch.context() as patch:
    patch.setattr(job._Job, step, lambda self, *unused: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      _prepare(path, out)
  return out.with_name(f"{out.name}.partial")


def test_a_folder_that_is_no_unfinished_one_is_left_alone(tmp_path):
  path, partial = _jsonl(tmp_path / "data"), tmp_path / "out.partial"
  partial.mkdir()
  names = ("notes.tmp", "x.done.json", "mine.txt")
  for name in names:
    (partial / name).write_text("mine")
  with pytest.raises(
    errors.DataError, match=r"holds something else \(mine.txt"
  ):
    _prepare(path, tmp_path / "out")
  assert {p.name for p in partial.iterdir()} == set(names)
  for name in names[1:]:
    (partial / name).unlink()  # even one that looks as if it were temporary
  with pytest.raises(errors.DataError, match=r"something else \(notes.tmp"):
    _prepare(path, tmp_path / "out")
  shutil.rmtree(partial)
  partial.write_text("a file")
  with pytest.raises(errors.DataError, match="is a file"):
    _prepare(path, tmp_path / "out")


def test_filters_that_leave_nothing_are_an_error_and_leave_nothing(tmp_path):
  path = tmp_path / "a.jsonl"
  table_files.encoded(0)
  (tmp_path / "0.png").write_bytes(b"no image")
  path.write_text('{"image": "0.png", "caption": "x"}\n')
  with pytest.raises(
    errors.DataError, match=r"nothing is left.*cannot be read"
  ):
    _prepare(path, tmp_path / "out", fields={"limit_share": 1.0})
  assert not list(tmp_path.glob("out*"))


def test_what_filters_leave_is_prepared_and_the_rest_counted(tmp_path):
  """An image without a caption that is left stays where a question shows it."""
  path = _jsonl(tmp_path / "data")
  with path.open("a") as file:
    file.write("no json\n")
  filters = {"filters": {"pattern": "[5-9]$"}}
  manifest = _prepare(path, tmp_path / "out", fields=filters)
  before, after = _opened(path, **filters), _opened(tmp_path / "out")
  assert after.num_examples("vqa") == before.num_examples("vqa") == 1
  assert after.num_examples("edit") == before.num_examples("edit") == 1
  assert _everything(after)[1] == _everything(before)[1]
  assert {len(after.captions(i)) for i in range(after.num_images)} == {0, 2}
  counts = manifest["left_out"]
  assert counts["bad lines, rows or samples of the source"] == 1
  captions = before.source.num_examples("image_text")
  assert counts["filters: captions"] == captions - manifest["captions"]
  assert counts["filters: images"] == 12 - manifest["images"]
  bad = (tmp_path / "out" / "bad.jsonl").read_text()
  assert "a.jsonl:" in bad


def test_an_image_that_changes_meanwhile_is_not_written(tmp_path, monkeypatch):
  path = _jsonl(tmp_path / "data", count=40)
  partial = _begun(path, tmp_path / "out", monkeypatch)
  (path.parent / "1.png").write_bytes(table_files.encoded(99))
  with pytest.raises(errors.LavitError, match=r"1\.png has changed.*Delete"):
    _prepare(path, tmp_path / "out")
  shutil.rmtree(partial)
  _prepare(path, tmp_path / "out")


def test_files_that_are_lost_are_written_again_or_missed(tmp_path, monkeypatch):
  path = _jsonl(tmp_path / "data")
  _prepare(path, tmp_path / "whole")
  with monkeypatch.context() as patch:
    patch.setattr(job, "_clean", lambda partial: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      _prepare(path, tmp_path / "out")
  partial = tmp_path / "out.partial"
  (partial / "manifest.json").unlink()
  (partial / "images-00000-of-00002.array_record").unlink()
  (partial / "images-00001.done.json").write_text("")
  (partial / "looks" / "images-00001.json").unlink()
  _prepare(path, tmp_path / "out")
  assert _bytes_of(tmp_path / "out") == _bytes_of(tmp_path / "whole")
  (tmp_path / "out" / "images-00000-of-00002.array_record").unlink()
  with pytest.raises(errors.DataError, match=r"images-00000.* is missing. Del"):
    _prepare(path, tmp_path / "out")


def test_an_end_before_the_last_renaming_loses_nothing(tmp_path, monkeypatch):
  path = _jsonl(tmp_path / "data")
  with monkeypatch.context() as patch:
    patch.setattr(job.os, "replace", lambda *paths: 1 / 0)
    patch.setattr(cache_shards, "replace", shutil.move)
    with pytest.raises(ZeroDivisionError):
      _prepare(path, tmp_path / "out")
  other = tmp_path / "other.jsonl"
  other.write_text('{"text": "words"}\n')
  with pytest.raises(errors.DataError, match="with other data"):
    _prepare(other, tmp_path / "out")
  _prepare(path, tmp_path / "out")
  _prepare(path, tmp_path / "whole")
  assert _bytes_of(tmp_path / "out") == _bytes_of(tmp_path / "whole")


def test_two_do_not_write_one_folder(tmp_path, monkeypatch):
  path = _jsonl(tmp_path / "data")
  real = job._Job._look

  def look(self):
    with pytest.raises(errors.DataError, match="being written by another"):
      _prepare(path, tmp_path / "out")
    real(self)

  monkeypatch.setattr(job._Job, "_look", look)
  _prepare(path, tmp_path / "out")


def test_prepared_data_are_prepared_to_the_same_bytes(tmp_path):
  _prepare(_jsonl(tmp_path / "data"), tmp_path / "one")
  _prepare(tmp_path / "one", tmp_path / "two")
  left, right = (_bytes_of(tmp_path / name) for name in ("one", "two"))
  for files_ in (left, right):
    del files_["manifest.json"]  # it says from what
  assert left == right


@pytest.mark.parametrize(
  "change",
  [
    {"format": True}, {"files": {}}, {"files": []}, {"images": -3},
    {"captions": "x"}, {"examples": None}, {"left_out": 7}, {"bytes": 1},
    {"settings": [1]}, {"shards": {"images": [], "examples": []}},
    {"files": {"..": ["0", 1]}}, {"files": {"a": [1, 2, 3]}},
    {"files": {"\0": ["0", 1]}}, {"files": {"a": "abc"}},
  ],
)  # fmt: skip
def test_an_edited_manifest_is_refused(tmp_path, change):
  path = _jsonl(tmp_path / "data")
  manifest = _prepare(path, tmp_path / "out")
  file = tmp_path / "out" / "manifest.json"
  file.write_text(json.dumps(manifest | change))
  for use in (job.verify, prepared.read_manifest):
    with pytest.raises(errors.DataError, match="damaged or of another version"):
      use(tmp_path / "out")
  with pytest.raises(errors.DataError, match="damaged or of another version"):
    _prepare(path, tmp_path / "out")


def test_a_manifest_of_something_else_is_none_of_ours(tmp_path):
  for text in ("[1]", '{"name": "web app"}', "[" * 100_000):
    (tmp_path / "manifest.json").write_text(text)
    assert not prepared.is_named(tmp_path)


def test_an_unreadable_image_is_counted_not_fatal(tmp_path):
  """Also where it is one of those that tell the data from others."""
  _prepare(_jsonl(tmp_path / "data", count=40), tmp_path / "out")
  file = tmp_path / "out" / "images-00000-of-00006.array_record"
  data = bytearray(file.read_bytes())
  data[70] ^= 255
  file.write_bytes(data)
  manifest = _prepare(tmp_path / "out", tmp_path / "again")
  assert manifest["left_out"]["cannot be read"] >= 1
