"""Fingerprints of what sources hold."""

import json

import pytest
from PIL import Image

from lavit_jax.data import contents, jsonl, shapes


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
  "a picture": lambda rows: [
    *rows[:7],
    rows[7] | {"image": "1.png"},
    *rows[8:],
  ],
}


@pytest.mark.parametrize("change", _CHANGES)
def test_any_change_of_a_file_is_another_digest(tmp_path, change):
  rows = _lines(tmp_path)
  before = _digest(tmp_path, rows)
  assert _digest(tmp_path, rows) == before
  assert _digest(tmp_path, _CHANGES[change](rows)) != before


def test_parts_and_sizes_are_told_apart(tmp_path):
  rows = _lines(tmp_path)
  parts = [_digest(tmp_path, rows, split=s) for s in ("train", "held_out")]
  assert len({_digest(tmp_path, rows), *parts}) == 3


@pytest.mark.parametrize(
  "change", [{"seed": 1}, {"size": 11}, {"image_size": 32}, {"split": "train"}]
)
def test_scenes_are_told_by_what_they_are_drawn_from(change):
  settings = dict(split="held_out", size=10, image_size=48, seed=0)
  source = shapes.ShapesSource(**settings)
  assert contents.of(shapes.ShapesSource(**settings)) == contents.of(source)
  other = shapes.ShapesSource(**settings | change)
  assert contents.of(other) != contents.of(source)


def test_other_words_of_the_same_scenes_are_another_digest(monkeypatch):
  source = shapes.ShapesSource(size=10)
  before = contents.of(source)
  plain = shapes.ShapesSource.example

  def loud(self, task, i):
    made = plain(self, task, i)
    return type(made)(made.key + "!", made.task, made.parts)

  monkeypatch.setattr(shapes.ShapesSource, "example", loud)
  assert contents.of(source) != before
