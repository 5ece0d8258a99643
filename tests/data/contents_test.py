"""Fingerprints of the contents of sources."""

import gzip
import hashlib
import io
import json
import tracemalloc

import hypothesis
import pytest
from hypothesis import strategies as st
from PIL import Image

from lavit_jax.data import contents
from lavit_jax.data.sources import jsonl, shapes


def _lines(folder, count=40):
  rows = []
  for i in range(count):
    Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    rows.append({"image": f"{i}.png", "caption": f"number {i}"})
  return rows


def _digest(folder, rows, **kwargs):
  (folder / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return contents.of(jsonl.JsonlSource(folder / "my.jsonl", 8, **kwargs))


_CHANGES = {
  "reordered": lambda rows: [*rows[1:], rows[0]],
  "extended": lambda rows: [*rows, {"text": "one more"}],
  "shortened": lambda rows: rows[:-1],
  "a caption": lambda rows: [*rows[:7], rows[7] | {"caption": "x"}, *rows[8:]],
  "an image": lambda rows: [
    *rows[:7],
    rows[7] | {"image": "1.png"},
    *rows[8:],
  ],
}


@pytest.mark.parametrize("change", _CHANGES)
def test_any_change_of_a_file_changes_the_digest(tmp_path, change):
  rows = _lines(tmp_path)
  before = _digest(tmp_path, rows)
  assert _digest(tmp_path, rows) == before
  assert _digest(tmp_path, _CHANGES[change](rows)) != before


def test_line_ends_and_blank_lines_do_not_change_the_digest(tmp_path):
  rows = _lines(tmp_path)
  before = _digest(tmp_path, rows)
  path = tmp_path / "my.jsonl"
  path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n\r\n") + b"\n")
  assert contents.of(jsonl.JsonlSource(path, 8)) == before


_FORMS = {
  "lines": lambda rows: "\n".join(map(json.dumps, rows)),
  "one line": json.dumps,
  "indented": lambda rows: json.dumps(rows, indent=1),
}


@pytest.mark.parametrize("form", _FORMS)
def test_compressing_a_file_does_not_change_its_digest(tmp_path, form):
  data = _FORMS[form](_lines(tmp_path)).encode()
  digests = set()
  for packed in (
    data,
    gzip.compress(data, 1, mtime=1),
    gzip.compress(data, 9, mtime=2),
    gzip.compress(data[:40]) + gzip.compress(data[40:]),
  ):
    (tmp_path / "my.jsonl").write_bytes(packed)
    digests.add(contents.of(jsonl.JsonlSource(tmp_path / "my.jsonl", 8)))
  assert len(digests) == 1


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
  st.lists(st.text("ab \t", max_size=9), max_size=6), st.integers(1, 7)
)
def test_a_line_is_hashed_the_same_wherever_it_is_cut(texts, chunk):
  """Digests of old runs stay: of each line, stripped, and a line end."""
  file = io.BytesIO("\n".join(texts).encode())
  cut = contents._hash_lines(file, hashlib.sha256(), chunk)
  stripped = [t.strip() for t in texts if t.strip()]
  whole = "".join(f"{t}\n" for t in stripped)
  assert cut.hexdigest() == hashlib.sha256(whole.encode()).hexdigest()


def test_a_file_of_one_line_is_hashed_in_chunks(tmp_path):
  rows = [{"text": f"number {i} " + "x" * 3000} for i in range(3000)]
  path = tmp_path / "my.json"
  path.write_text(json.dumps(rows))
  source = jsonl.JsonlSource(path, 8)
  tracemalloc.start()
  try:
    contents.of(source)
    assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 2
  finally:
    tracemalloc.stop()


def test_splits_have_different_digests(tmp_path):
  rows = _lines(tmp_path)
  parts = [_digest(tmp_path, rows, split=s) for s in ("train", "held_out")]
  assert len({_digest(tmp_path, rows), *parts}) == 3


@pytest.mark.parametrize(
  "change", [{"seed": 1}, {"size": 11}, {"image_size": 32}, {"split": "train"}]
)
def test_the_digest_of_scenes_depends_on_every_setting(change):
  settings = dict(split="held_out", size=10, image_size=48, seed=0)
  source = shapes.ShapesSource(**settings)
  assert contents.of(shapes.ShapesSource(**settings)) == contents.of(source)
  other = shapes.ShapesSource(**settings | change)
  assert contents.of(other) != contents.of(source)


def test_other_texts_of_the_same_scenes_have_another_digest(monkeypatch):
  source = shapes.ShapesSource(size=10)
  before = contents.of(source)
  plain = shapes.ShapesSource.example

  def loud(self, task, i):
    made = plain(self, task, i)
    return type(made)(made.key + "!", made.task, made.parts)

  monkeypatch.setattr(shapes.ShapesSource, "example", loud)
  assert contents.of(source) != before
