"""Many and large files of JSON lines, read in place."""

import bz2
import gzip
import itertools
import json
import lzma

import numpy as np
import pyarrow as pa
import pytest

from lavit_jax.core import errors, vocabulary
from lavit_jax.data import contents, examples
from lavit_jax.data.batching import pipeline
from lavit_jax.data.indexes import stored, unpacked
from lavit_jax.data.sources import jsonl, kinds
from lavit_jax.data.sources.tables import json_lines
from tests.data import fakes
from tests.data.indexes import table_files
from tests.train import fake_gcs


def _zstd(data):
  return pa.compress(data, codec="zstd", asbytes=True)


PACKERS = {
  "": lambda data: data,
  ".gz": gzip.compress,
  # Of two parts, as tools that use several threads write it.
  ".zst": lambda data: _zstd(data[:100]) + _zstd(data[100:]),
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
}


@pytest.fixture(autouse=True)
def _indexes(tmp_path, monkeypatch):
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "kept"))


def _rows(count, start=0):
  """Lines of every task; the last is bad."""
  rows = []
  for i in range(start, start + count):
    image = f"{i}.png"
    rows.append(
      [
        {"image": image, "captions": [f"image {i}", f"number {i}"]},
        {"text": f"words of {i}"},
        {"image": image, "question": "what", "answer": f"{i}"},
        {"messages": ["see", {"type": "image", "image": image}, f"it {i}"]},
      ][i % 4]
    )
  return [json.dumps(row) for row in rows] + ["{bad"]


def _write(folder, packer="", files=2, count=40):
  folder.mkdir(parents=True, exist_ok=True)
  for f in range(files):
    data = "\n".join(_rows(count, f * count)).encode() + b"\n"
    (folder / f"{f}.jsonl{packer}").write_bytes(PACKERS[packer](data))
  for i in range(files * count):
    (folder / f"{i}.png").write_bytes(table_files.encoded(i))
  return folder


def _opened(path, **kwargs):
  return json_lines.JsonLinesSource(path, fakes.SIZE, quiet=True, **kwargs)


def _every(source):
  """All examples of a source, with the names of their images' files."""
  named = lambda part: (
    (source.encoded(part.image).name, part.write, part.weight)
    if isinstance(part, examples.ImagePart)
    else part
  )
  return {
    task: [
      list(map(named, source.example(task, i).parts))
      for i in range(source.num_examples(task))
    ]
    for task in source.tasks()
  }


@pytest.mark.parametrize("packer", PACKERS)
def test_lines_are_those_of_a_file_in_memory(tmp_path, packer):
  folder = _write(tmp_path / "data", packer)
  source = _opened(folder)
  whole = [
    jsonl.JsonlSource(folder / f"{f}.jsonl{packer}", fakes.SIZE)
    for f in range(2)
  ]
  parts = [_every(one) for one in whole]
  assert _every(source) == {
    task: [x for part in parts for x in part[task]] for task in parts[0]
  }
  assert source.faults.bad == 2
  np.testing.assert_array_equal(source.image(0), whole[0].image(0))
  again = _opened(folder)
  assert contents.of(again) == contents.of(source)
  copies = list(stored.folder().rglob("*.unpacked"))
  assert len(copies) == (2 if packer else 0)


def test_a_copy_of_a_file_that_has_changed_goes(tmp_path):
  folder = _write(tmp_path / "data", ".gz", files=1)
  _opened(folder)
  (before,) = stored.folder().rglob("*.unpacked")
  path = folder / "0.jsonl.gz"
  path.write_bytes(gzip.compress(b'{"text": "other words"}\n'))
  assert _every(_opened(folder)) == {
    "text": [[examples.TextPart("other words")]]
  }
  (after,) = stored.folder().rglob("*.unpacked")
  assert before != after


@pytest.mark.parametrize("packer", sorted(set(PACKERS) - {""}))
def test_a_packed_file_that_is_cut_off_is_named(tmp_path, packer):
  folder = _write(tmp_path / "data", packer, files=1)
  path = folder / f"0.jsonl{packer}"
  path.write_bytes(path.read_bytes()[:-20])
  for opened in (_opened, lambda path: jsonl.JsonlSource(path, fakes.SIZE)):
    with pytest.raises(errors.DataError, match=r"0\.jsonl.*a damaged"):
      opened(path)
  assert not list(stored.folder().rglob("*.unpacked*"))


def test_a_file_that_grows_beyond_all_measure_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(unpacked, "_MOST", 2)
  monkeypatch.setattr(unpacked, "_LARGE", 1 << 10)
  path = tmp_path / "a.jsonl.gz"
  path.write_bytes(gzip.compress(b'{"text": "words"}\n' * 1000))
  with pytest.raises(errors.DataError, match="more than 2 times its size"):
    _opened(path)
  assert not list(stored.folder().rglob("*.tmp"))


def test_which_files_are_read_in_place(tmp_path, monkeypatch):
  folder = _write(tmp_path / "data", files=2, count=8)
  config = dict(
    kind="jsonl", image_size=4, seed=0, held_out_path="", limit_share=0.2
  )
  build = lambda path: kinds.build(config | {"path": str(path)}, "train")
  in_place = json_lines.JsonLinesSource
  assert isinstance(build(folder / "0.jsonl"), jsonl.JsonlSource)
  for path in (folder, folder / "*.jsonl", folder / "{0,1}.jsonl"):
    assert isinstance(build(path), in_place)
    assert kinds.kind_of(path) == "jsonl"
  monkeypatch.setattr(json_lines, "_LARGE", 100)
  assert isinstance(build(folder / "0.jsonl"), in_place)
  train, held_out = kinds.pair(config | {"path": str(folder)})
  names = [
    {source.encoded(i).name for i in range(source.num_images)}
    for source in (train, held_out)
  ]
  assert all(names)
  assert not names[0] & names[1]
  described = kinds.describe(config | {"path": "x"}, "train", train)
  assert described.startswith("train, nine tenths by hash, of data: ")


def test_a_held_out_file_that_is_trained_on_is_told(tmp_path, caplog):
  folder = _write(tmp_path / "data", files=2, count=8)
  config = dict(kind="jsonl", image_size=4, seed=0, limit_share=0.2)
  paths = dict(path=str(folder), held_out_path=str(folder / "1.jsonl"))
  train, held_out = kinds.pair(config | paths)
  assert type(train) is type(held_out)
  assert "8 of 8 held-out rows are in the training data too" in caplog.text


def test_fields_of_other_names(tmp_path):
  folder = _write(tmp_path / "data", files=0, count=2)
  rows = [{"pic": f"{i}.png", "alt": f"words {i}"} for i in (0, 1)]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "a.jsonl").write_text(text)
  (folder / "0.png").write_bytes(table_files.encoded(0))
  source = _opened(folder, image_column="pic", text_column="alt")
  assert [source.captions(i) for i in (0, 1)] == [["words 0"], ["words 1"]]
  assert source.encoded(1).name == "1.png"


def test_lines_become_batches(tmp_path):
  source = _opened(_write(tmp_path / "data"))
  batches = pipeline.packed_rows(
    source,
    fakes.Cache([3] * source.num_images),
    fakes.Words(),
    vocabulary.Vocabulary(fakes.Words.size, fakes.CODES),
    mixture=dict.fromkeys(source.tasks(), 1.0),
    length=64,
    slots=4,
    batch_size=4,
    window=16,
  )
  for batch in itertools.islice(pipeline.iterate(batches, num_threads=2), 4):
    assert batch["keep"].any()
    assert batch["weights"].any()


def test_files_of_an_object_store(tmp_path, monkeypatch):
  folder = _write(tmp_path / "data", ".gz", count=8)
  with fake_gcs.serving(monkeypatch) as store:
    fake_gcs.upload(store, folder, "gs://bucket/data")
    assert json_lines.is_meant("gs://bucket/data/*.jsonl.gz")
    assert not json_lines.is_meant("gs://bucket/data/0.jsonl.gz")
    source = _opened("gs://bucket/data/{0,1}.jsonl.gz", limit_share=0.2)
    here = _opened(folder, limit_share=0.2)
    assert _every(source) == _every(here)
    np.testing.assert_array_equal(source.image(3), here.image(3))
