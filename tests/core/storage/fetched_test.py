"""Every input of a user may be in an object store."""

import collections
import importlib.resources
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from PIL import Image

from lavit_jax.commands import main
from lavit_jax.core import errors, image_io, vocabulary
from lavit_jax.core.storage import checkpoints, fetched, files, fingerprints
from lavit_jax.data import contents
from lavit_jax.data.caches import codes as codes_lib
from lavit_jax.data.caches import latents
from lavit_jax.data.sources import jsonl
from lavit_jax.infer import pipeline
from tests.train import fake_gcs


@pytest.fixture
def store(monkeypatch, tmp_path):
  monkeypatch.setenv("LAVIT_FETCHED", str(tmp_path / "fetched"))
  with fake_gcs.serving(monkeypatch) as fs:
    yield fs


def test_a_part_is_written_replaced_and_read(store):
  folder = "gs://bucket/a model"
  for step in range(3):
    tree = {"b": {"w": np.full((3, 5), step, "float32")}}
    made = checkpoints.save_part(folder, "llm", tree, {"step": step})
    assert str(made) == f"{folder}/llm"
    part = checkpoints.load_part(folder, "llm")
    assert part.meta["step"] == step
    np.testing.assert_array_equal(part.params["b"]["w"], tree["b"]["w"])
  assert checkpoints.parts_in(folder) == ["llm"]
  stored = checkpoints.StoredPart(folder, "llm")
  np.testing.assert_array_equal(stored.read("b/w"), tree["b"]["w"])
  whole = np.zeros((3, 5), "float32")
  for index, piece in stored.blocks("b/w", 0):
    whole[index] = piece
  np.testing.assert_array_equal(whole, tree["b"]["w"])
  weights = {n.split("/")[4] for n in store.store if "/llm/weights" in n}
  assert len(weights) == 1  # those before are gone
  with pytest.raises(errors.CheckpointError, match="has no part 'encoder'"):
    checkpoints.load_part(folder, "encoder")


@pytest.mark.slow
def test_the_shipped_model_is_used_from_the_store(store):
  tiny = pathlib.Path(str(importlib.resources.files("lavit_jax")))
  tiny /= "weights/tiny"
  fake_gcs.upload(store, tiny, "gs://bucket/tiny")
  here, there = pipeline.LaVIT.load(), pipeline.LaVIT.load("gs://bucket/tiny")
  told = there.info()
  assert told.pop("directory") == "gs://bucket/tiny"
  assert told.items() <= here.info().items()
  of = fingerprints.of_part
  assert of("gs://bucket/tiny", "tokenizer") == of(tiny, "tokenizer")
  assert there.text.encode("a red circle") == here.text.encode("a red circle")
  with pytest.raises(errors.CheckpointError, match="no model directory"):
    pipeline.LaVIT.load("gs://bucket/nothing")


_META = codes_lib.Meta("data", "weights", 10, 9, 100, shard_size=4)


def _codes(first, stop):
  for i in range(first, stop):
    yield i, np.arange(9) <= i % 9, np.arange(i % 9 + 1) + i


@pytest.fixture
def codes(store, tmp_path):
  codes_lib.write(tmp_path / "codes", _codes, _META)
  fake_gcs.upload(store, tmp_path / "codes", "gs://bucket/codes")
  return "gs://bucket/codes"


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_code_cache_is_copied_once_and_read(codes, monkeypatch, in_memory):
  if not in_memory:
    monkeypatch.setattr(codes_lib, "_IN_MEMORY", 0)
  copied = collections.Counter()
  copy = fetched._copy

  def counted(source, *args):
    copied[source.name] += 1
    copy(source, *args)

  monkeypatch.setattr(fetched, "_copy", counted)
  for _ in range(2):
    made = codes_lib.CodeCache.load(codes)
    for i, keep, ids in _codes(0, 10):
      np.testing.assert_array_equal(made.keep(i), keep)
      np.testing.assert_array_equal(made.codes(i), ids)
  assert len(copied) == 4
  assert set(copied.values()) == {1}


def test_a_cache_that_was_written_again_is_copied_again(codes, store, tmp_path):
  codes_lib.CodeCache.load(codes)
  other = lambda *some: ((i, k, c + 1) for i, k, c in _codes(*some))
  codes_lib.write(tmp_path / "other", other, _META)
  fake_gcs.upload(store, tmp_path / "other", codes)
  np.testing.assert_array_equal(codes_lib.CodeCache.load(codes).codes(0), [1])


def _written_anew(store, tmp_path, codes, add):
  """Another version of the cache in the store, and a process that reads it."""
  other = lambda *some: ((i, k, c + add) for i, k, c in _codes(*some))
  folder = tmp_path / f"version {add}"
  codes_lib.write(folder, other, _META)
  fake_gcs.upload(store, folder, codes)


def _ended():
  """Releases the locks of this process, as its end does."""
  for lock in fetched._locks.values():
    lock.close()
  fetched._locks.clear()


def _copies(tmp_path):
  """Files of the copies by their folder; locks have none."""
  found = collections.defaultdict(list)
  for path in (tmp_path / "fetched").rglob("*"):
    if path.is_file() and path.stat().st_size:
      found[path.parent].append(path.name)
  return found


def test_one_copy_of_a_source_is_kept(codes, store, tmp_path):
  codes_lib.CodeCache.load(codes)
  fake_gcs.upload(store, tmp_path / "codes", "gs://bucket/another")
  codes_lib.CodeCache.load("gs://bucket/another")
  for add in (1, 2, 3):
    _ended()
    _written_anew(store, tmp_path, codes, add)
    np.testing.assert_array_equal(
      codes_lib.CodeCache.load(codes).codes(0), [add]
    )
    assert len(_copies(tmp_path)) == 2  # that of another place stays


def test_a_copy_in_use_is_not_removed(codes, store, tmp_path):
  """Nor one of this process."""
  old = codes_lib.CodeCache.load(codes)
  _written_anew(store, tmp_path, codes, 1)
  new = codes_lib.CodeCache.load(codes)
  assert len(_copies(tmp_path)) == 2
  np.testing.assert_array_equal(old.codes(0), [0])
  np.testing.assert_array_equal(new.codes(0), [1])
  script = (
    "import sys, time; from lavit_jax.core.storage import fetched\n"
    "lock = fetched._lock(__import__('pathlib').Path(sys.argv[1]))\n"
    "print('holds', flush=True); time.sleep(60)"
  )
  newest = max(_copies(tmp_path), key=lambda p: p.stat().st_mtime_ns)
  (held,) = set(_copies(tmp_path)) - {newest}
  _ended()
  with subprocess.Popen(
    [sys.executable, "-c", script, str(held)], stdout=subprocess.PIPE
  ) as other:
    assert other.stdout.readline() == b"holds\n"
    _written_anew(store, tmp_path, codes, 2)
    codes_lib.CodeCache.load(codes)
    assert held in _copies(tmp_path)
    assert len(_copies(tmp_path)) == 2
    other.kill()
  _ended()
  _written_anew(store, tmp_path, codes, 3)
  codes_lib.CodeCache.load(codes)
  assert len(_copies(tmp_path)) == 1


def test_partial_files_of_a_killed_copy_are_removed(codes, tmp_path):
  codes_lib.CodeCache.load(codes)
  (folder,) = _copies(tmp_path)
  victim = next(folder.glob("*.array_record"))
  stale = folder / f"{victim.name}.0123.tmp"
  fresh = folder / f"{victim.name}.4567.tmp"  # of a process that copies now
  for path in (stale, fresh):
    path.write_bytes(b"x" * 99)
  hours = time.time() - 7200
  os.utime(stale, (hours, hours))
  victim.unlink()
  codes_lib.CodeCache.load(codes)
  assert victim.exists()
  assert not stale.exists()
  assert fresh.exists()


def test_truncated_copies_are_made_again(codes, tmp_path):
  codes_lib.CodeCache.load(codes)
  for path in (tmp_path / "fetched").rglob("*.array_record"):
    path.write_bytes(path.read_bytes()[:-5])
  assert len(codes_lib.CodeCache.load(codes).codes(9)) == 1


def test_files_that_do_not_fit_the_disk_are_refused_before_any_copy(
  codes, monkeypatch, tmp_path
):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(errors.DataError, match="LAVIT_FETCHED"):
    codes_lib.CodeCache.load(codes)
  assert not _copies(tmp_path)


def test_a_cache_with_a_shard_missing_is_damaged(codes, store):
  store.rm_file(f"{codes}/codes-00001.array_record")
  with pytest.raises(errors.DataError, match="gs://bucket/codes is damaged"):
    codes_lib.CodeCache.load(codes)
  with pytest.raises(errors.DataError, match="holds no code cache"):
    codes_lib.CodeCache.load("gs://bucket/nothing")


def test_latents_are_read_without_a_copy(store, tmp_path):
  assigned = np.array([0, 1, 0, 1], np.int8)
  meta = latents.Meta("data", "vae", 4, ((8, 8), (8, 4)), 4, 3)
  rng = np.random.default_rng(0)
  made = [rng.normal(size=meta.shape(meta.buckets[b])) for b in assigned]
  made = [x.astype(np.float16) for x in made]
  write = lambda numbers: (made[i] if i != 2 else None for i in numbers)
  latents.write(tmp_path / "latents", write, meta, assigned)
  fake_gcs.upload(store, tmp_path / "latents", "gs://bucket/latents")
  found = latents.LatentCache.load("gs://bucket/latents", source="data")
  for i in (0, 1, 3):
    np.testing.assert_array_equal(found.latents(i), made[i])
  assert [found.good(i) for i in range(4)] == [True, True, False, True]
  assert not (tmp_path / "fetched").exists()
  store.pipe_file("gs://bucket/latents/latents-1.f16", b"short")
  with pytest.raises(errors.DataError, match="is damaged"):
    latents.LatentCache.load("gs://bucket/latents")


def test_lines_and_their_images_are_read(store, tmp_path):
  for i in range(4):
    Image.new("RGB", (8, 4), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
  rows = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(4)]
  rows.append({"image": "missing.png", "caption": "none"})
  text = "\n".join(map(json.dumps, rows))
  (tmp_path / "my.jsonl").write_text(text)
  fake_gcs.upload(store, tmp_path, "gs://bucket/some data")
  here = jsonl.JsonlSource(tmp_path / "my.jsonl", 8)
  there = jsonl.JsonlSource("gs://bucket/some data/my.jsonl", 8)
  assert contents.of(there) == contents.of(here)
  for i in range(4):
    np.testing.assert_array_equal(there.image(i), here.image(i))
    assert there.image_key(i) == here.image_key(i)
    assert image_io.size_of(there.encoded(i)) == (4, 8)
  with pytest.raises(image_io.ImageError, match=r"missing\.png"):
    there.image(4)
  with pytest.raises(errors.DataError, match=r"gs://bucket/no\.jsonl"):
    jsonl.JsonlSource("gs://bucket/no.jsonl", 8)


def test_a_text_tokenizer_is_written_and_read(store):
  path = epath.Path("gs://bucket/model/tokenizer.model")
  words = ["red green blue"] * 20
  made = vocabulary.TextTokenizer.train(words, path, 280)
  found = vocabulary.TextTokenizer.load(str(path))
  assert found.encode("red") == made.encode("red")


def test_two_names_of_one_directory_are_the_same():
  same = files.same
  assert same("gs://bucket/a", "gs://bucket/a/")
  assert not same("gs://bucket/a", "gs://bucket/b")
  assert not same("", "gs://bucket/b")
  assert same("a/../b/", "b")
  assert not same(None, "")


@pytest.mark.parametrize(
  "line",
  [
    "tokenize --data shapes --out gs://bucket/x",
    "latents --config tiny/latents.py --out gs://bucket/x",
    "port import nowhere gs://bucket/x",
    "port export tiny gs://bucket/x --format huggingface",
    "quickstart --workdir gs://bucket/x",
    "generate red --out gs://bucket/x.png",
  ],
)
def test_commands_that_need_a_disk_say_so_and_write_nothing(
  store, tmp_path, monkeypatch, capsys, line
):
  monkeypatch.chdir(tmp_path)
  assert main.main(line.split()) == 2
  assert "gcloud storage cp -r FOLDER gs://bucket/x" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_a_change_while_it_is_copied_is_noticed(store, tmp_path):
  store.pipe_file("gs://bucket/a", b"12345")
  with pytest.raises(errors.DataError, match="had 9 bytes, but 5 were copied"):
    fetched._copy(epath.Path("gs://bucket/a"), tmp_path / "a", 9)
  assert not list(tmp_path.iterdir())
