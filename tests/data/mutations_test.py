"""Damaged data are read or refused in words, and what is lost is counted.

LAVIT_MUTATIONS=5000 tries as many of each kind; a few by default.
"""

import contextlib
import io
import json
import os
import random

import numpy as np
import pytest

from lavit_jax.core import errors, image_io
from lavit_jax.data import examples
from lavit_jax.data.images import decoding
from lavit_jax.data.sources import jsonl, prepared, webdataset
from lavit_jax.data.sources.tables import json_lines, parquet
from lavit_jax.jobs.prepare import job
from lavit_jax.jobs.prepare import plan as plan_lib
from tests.data import fakes
from tests.data.indexes import table_files, tars
from tests.jobs import here

_COUNT = int(os.environ.get("LAVIT_MUTATIONS", "30"))
_ROWS = 40


@pytest.fixture(autouse=True)
def _indexes(tmp_path, monkeypatch):
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "kept"))


def _mutated(data, rng, *, keep=b""):
  """Returns bytes changed, left out, doubled, moved or cut off.

  Args:
    data: bytes.
    rng: a random.Random.
    keep: a byte that is neither taken nor given.
  """
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 5))):
    if not data:
      break
    at, size = rng.randrange(len(data)), rng.choice((1, 1, 4, 64))
    how = rng.randrange(5)
    if how == 0:
      data[at] ^= 1 << rng.randrange(8)
    elif how == 1:
      del data[at : at + size]
    elif how == 2:
      data[at:at] = data[at : at + size]
    elif how == 3:
      data[at : at + size] = rng.randbytes(size)
    elif not keep:
      del data[at:]
  return bytes(data)


def _read(make):
  """Reads all of a source; returns it, or None if it is refused in words."""
  try:
    source = make()
    for task in source.tasks():
      for i in range(source.num_examples(task)):
        assert isinstance(source.example(task, i), examples.Example)
    for i in range(source.num_images):
      assert isinstance(source.image_key(i), str)
      with contextlib.suppress(image_io.ImageError):
        assert source.image(i).shape == (fakes.SIZE, fakes.SIZE, 3)
  except errors.LavitError:
    return None
  return source


def _rows():
  return [
    [
      {"image": f"{i}.png", "caption": f"image {i}"},
      {"text": f"words {i} ä"},
      {"image": f"{i}.png", "question": "what", "answer": f"{i}"},
      {"messages": ["see", {"type": "image", "image": f"{i}.png"}, "it"]},
    ][i % 4]
    for i in range(_ROWS)
  ]


def _lines(tmp_path):
  for i in range(_ROWS):
    (tmp_path / f"{i}.png").write_bytes(table_files.encoded(i % 3))
  return [json.dumps(row).encode() for row in _rows()]


@pytest.mark.parametrize("in_place", [False, True])
def test_lines(tmp_path, in_place, caplog):
  """Every line is an example, or is counted as bad."""
  caplog.set_level("ERROR")
  lines = _lines(tmp_path)
  path = tmp_path / "a.jsonl"
  make = json_lines.JsonLinesSource if in_place else jsonl.JsonlSource
  for seed in range(_COUNT):
    rng = random.Random(seed)
    some = list(lines)
    for k in rng.sample(range(_ROWS), 3):
      line = _mutated(some[k], rng, keep=b"\n")
      some[k] = line.replace(b"\n", b" ").replace(b"\r", b" ") or b"x"
    path.write_bytes(b"\n".join(some))
    source = _read(lambda: make(path, fakes.SIZE, limit_share=1.0))
    if source is None:
      continue  # the first line tells another kind of file
    blank = sum(not line.strip() for line in some)
    assert source.faults.seen == _ROWS - blank
    keys = {
      source.example(task, i).key
      for task in source.tasks()
      for i in range(source.num_examples(task))
    }
    # An image alone is no example, and not lost: a caption may be gone.
    assert len(keys) >= _ROWS - blank - source.faults.bad - 3


def test_archives(tmp_path, caplog):
  caplog.set_level("ERROR")
  path = tmp_path / "a.tar"
  files = []
  for k in range(9):
    files += tars.sample(f"{k:03d}", f"image {k}", seed=k)
  whole = tars.write(path, files).read_bytes()
  for seed in range(_COUNT):
    data = _mutated(whole, random.Random(seed))
    path.write_bytes(data)
    source = _read(
      lambda: webdataset.WebDatasetSource(
        path, fakes.SIZE, limit_share=1.0, quiet=True
      )
    )
    # Where an archive ends between two files, nothing tells of others.
    between = len(data) < len(whole) - 1024 and len(data) % 512 == 0
    if source is not None and not between:
      assert source.num_images == 9 or source.faults.bad, seed


def test_tables(tmp_path, caplog):
  caplog.set_level("ERROR")
  path = tmp_path / "a.parquet"
  columns = {
    "image": table_files.embedded(9),
    "caption": [f"image {k}" for k in range(9)],
  }
  table_files.parquet(path, columns, image="image", caption="string")
  whole = path.read_bytes()
  for seed in range(_COUNT):
    path.write_bytes(_mutated(whole, random.Random(seed)))
    source = _read(
      lambda: parquet.ParquetSource(
        path, fakes.SIZE, limit_share=1.0, quiet=True
      )
    )
    if source is not None:
      assert source.num_rows + source.faults.bad == 9


def test_prepared_shards(tmp_path, monkeypatch, caplog):
  caplog.set_level("ERROR")
  _lines(tmp_path)
  path = tmp_path / "a.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in _rows()))
  here.patch(monkeypatch)
  job.prepare(
    str(path), tmp_path / "out", settings=plan_lib.Settings(), quiet=True
  )
  whole = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
  make = lambda: prepared.PreparedSource(tmp_path / "out", fakes.SIZE)
  listed, refused = prepared.read_manifest(tmp_path / "out")["files"], 0
  for seed in range(_COUNT):
    rng = random.Random(seed)
    name = rng.choice(sorted(whole))
    mutated = _mutated(whole[name], rng)
    (tmp_path / "out" / name).write_bytes(mutated)
    refused += _read(make) is None
    if name in listed:  # its checksum tells any change
      changed = mutated != whole[name]
      assert bool(job.verify(tmp_path / "out")) == changed
    (tmp_path / "out" / name).write_bytes(whole[name])
  assert refused > _COUNT // 4
  assert _read(make) is not None


def _encoded(format):
  image = image_io.to_pil(
    np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
  )
  file = io.BytesIO()
  image.save(file, format)
  return file.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_images(format):
  """Both ways decode it, or both refuse it in the same words."""
  whole = _encoded(format)
  for seed in range(_COUNT):
    data = _mutated(whole, random.Random(seed))
    said = []
    for way in (decoding.exact, decoding.fast):
      try:
        said.append(way(data, 16, "x").shape)
      except image_io.ImageError as error:
        said.append(str(error))
    assert said[0] == said[1]
