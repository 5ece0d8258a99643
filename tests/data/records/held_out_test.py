import hashlib
import json
import random

import hypothesis
import pytest
from hypothesis import strategies as st
from PIL import Image

from lavit_jax.core import errors
from lavit_jax.data.records import forms, held_out
from lavit_jax.data.sources import jsonl


def _entries(lines):
  """Entries of lines of images: (1, 2) reads 1.jpg and 2.jpg."""
  reader = forms.Reader("d.jsonl")
  made = []
  for number, images in enumerate(lines, start=1):
    parts = [{"type": "image", "image": f"{p}.jpg"} for p in images]
    row = {"messages": parts} if parts else {"text": f"text {number}"}
    made.append(reader.entry(number, row))
  return made


def _by_hash(key, share):
  value = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
  return value < share * 2**32


_LINES = st.lists(st.lists(st.integers(0, 30), max_size=4), max_size=40)
_SETTINGS = hypothesis.settings(
  max_examples=80, deadline=None, derandomize=True
)


@_SETTINGS
@hypothesis.given(_LINES, st.sampled_from([0.1, 0.4]))
def test_no_image_is_in_both_splits(lines, share):
  held = held_out.choose(_entries(lines), share)
  halves = {True: set(), False: set()}
  for images, half in zip(lines, held, strict=True):
    halves[half] |= set(images)
  assert not halves[True] & halves[False]


@_SETTINGS
@hypothesis.given(st.lists(st.integers(0, 99), max_size=40))
def test_lines_of_one_image_go_by_its_hash_alone(images):
  """As they always did, whatever else is in the file: caches stay valid."""
  held = held_out.choose(_entries([[p] for p in images]), 0.3)
  assert held == [_by_hash(f"{p}.jpg", 0.3) for p in images]


def test_lines_of_several_unshared_images_go_by_the_first():
  lines = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(60)]
  held = held_out.choose(_entries(lines), 0.3)
  assert held == [_by_hash(f"{3 * i}.jpg", 0.3) for i in range(60)]


def test_added_lines_move_no_other_line():
  rng = random.Random(0)
  lines = [[i, i + 1] for i in range(0, 200, 2)]
  before = held_out.choose(_entries(lines), 0.2)
  more = [[rng.choice(range(0, 200))] for _ in range(50)]  # of old images
  more += [[300 + i, 400 + i] for i in range(50)] + [[]] * 5
  after = held_out.choose(_entries([*lines, *more]), 0.2)
  assert after[: len(lines)] == before
  assert any(before)


def test_a_group_of_most_lines_is_trained_on_with_a_warning(caplog):
  """Whatever its hash says: a file's first image must not decide it all."""
  for first in range(30):
    lines = [[first, 100 + i] for i in range(20)] + [[i] for i in range(40, 60)]
    held = held_out.choose(_entries(lines), 0.1)
    assert not any(held[:20])
    assert held[20:] == [_by_hash(f"{i}.jpg", 0.1) for i in range(40, 60)]
  assert "20 of 40 lines are joined" in caplog.records[0].getMessage()
  assert "held_out_path" in caplog.records[0].getMessage()


def _write(tmp_path, rows, images):
  for i in range(images):
    Image.new("RGB", (1, 1)).save(tmp_path / f"{i}.png")
  path = tmp_path / "d.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  return path


def _keys(source):
  return [source.image_key(i) for i in range(source.num_images)]


def test_documents_and_edits_share_no_image_across_the_splits(tmp_path):
  rng = random.Random(0)
  rows = [{"image": f"{i}.png", "caption": f"{i}"} for i in range(100)]
  for i in range(0, 30, 3):
    parts = [{"type": "image", "image": f"{i + k}.png"} for k in range(3)]
    rows.append({"messages": parts})
  for i in range(30, 60, 2):
    edit = {"instruction": "x", "image": f"{i + 1}.png"}
    rows.append({"image": f"{i}.png", "edits": [edit]})
  rng.shuffle(rows)
  path = _write(tmp_path, rows, 100)
  sources = {
    s: jsonl.JsonlSource(path, 8, split=s, held_out_share=0.3)
    for s in ("all", "train", "held_out")
  }
  train, held, whole = (
    set(_keys(sources[s])) for s in ("train", "held_out", "all")
  )
  assert not train & held
  assert train | held == whole
  assert 10 <= len(held) <= 50
  for task in ("document", "edit", "image_text"):
    counts = [sources[s].num_examples(task) for s in ("train", "held_out")]
    assert sum(counts) == sources["all"].num_examples(task)


def test_a_file_that_cannot_be_split_says_so(tmp_path):
  pair = lambda i: [
    {"type": "image", "image": f"{p}.png"} for p in (i % 10, (i + 1) % 10)
  ]
  rows = [{"messages": pair(i)} for i in range(90)]
  path = _write(tmp_path, rows, 10)
  assert jsonl.JsonlSource(path, 8, split="train").num_images == 10
  with pytest.raises(errors.DataError, match="held_out_path"):
    jsonl.JsonlSource(path, 8, split="held_out")


def test_a_limit_counts_lines_of_the_split(tmp_path):
  rows = [{"image": f"{i}.png", "caption": "x"} for i in range(50)]
  path = _write(tmp_path, rows, 50)
  whole = jsonl.JsonlSource(path, 8, split="train")
  few = jsonl.JsonlSource(path, 8, split="train", limit=5)
  assert _keys(few) == _keys(whole)[:5]
