"""Filters: what they keep, that it is kept, and that codes still fit."""

import json
import logging
import pathlib

import numpy as np
import pytest
from PIL import Image

from lavit_jax.core import errors
from lavit_jax.data import contents, examples
from lavit_jax.data.batching import bucket_rows, pipeline
from lavit_jax.data.images import image_sizes
from lavit_jax.data.indexes import stored
from lavit_jax.data.records import filters
from lavit_jax.data.sources import filtered, kinds, webdataset
from tests.data.indexes import tars

_TEXTS = [
  "a cat",
  "",
  "ein Hund",
  "кошка на столе",
  "a https://x cat",
  "b" * 80,
]


@pytest.fixture
def config(tmp_path, monkeypatch):
  """config.data of archives: images of several sizes, texts, similarities."""
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "indexes"))
  files = []
  for i, text in enumerate(_TEXTS * 4):
    meta = {"similarity": 0.1 * (i % 5), "name": "x"}
    if i == 7:
      meta = {"similarity": float("nan")}
    sample = tars.sample(f"{i:03d}", text, meta=meta)
    size = (20 + 10 * (i % 3), 20)
    files += [(sample[0][0], tars.jpeg(i, size)), *sample[1:]]
  tars.write(tmp_path / "a.tar", files)
  return {
    "kind": "webdataset",
    "path": str(tmp_path / "a.tar"),
    "held_out_path": str(tmp_path / "a.tar"),
    "image_size": 8,
    "seed": 0,
  }


@pytest.mark.parametrize(
  ("text", "chosen", "kept"),
  [
    ("a cat", {"min_chars": 5}, True),
    ("a cat", {"min_chars": 6}, False),
    ("a cat", {"max_chars": 4}, False),
    ("a cat", {"pattern": r"\bcat\b"}, True),
    ("a cat", {"pattern": "dog"}, False),
    ("see https://x", {"without": "https?://"}, False),
    ("Ein Hund, 17", {"script": "latin"}, True),
    ("кошка a", {"script": "latin"}, False),
    ("кошка a", {"script": "cyrillic"}, True),
    ("猫がいる", {"script": "japanese"}, True),
    ("猫がいる", {"script": "chinese"}, False),
    ("1234", {"script": "latin"}, False),
  ],
)
def test_texts_are_kept_by_length_words_and_script(text, chosen, kept):
  assert filters.Filters.of(chosen).keeps_text(text) == kept


@pytest.mark.parametrize(
  ("chosen", "said"),
  [
    ({"min_size": 3}, "min_size"),
    ({"script": "klingon"}, "expected one of"),
    ({"pattern": "("}, "no regular expression"),
    ({"max_aspect": -1}, "0 or more"),
    ({"min_chars": "many"}, "0 or more"),
    ({"fields": {"similarity": 0.3}}, "least, most"),
    ({"fields": {"similarity": (0.5, 0.3)}}, "smaller one first"),
    ({"fields": {"similarity": (float("nan"), 1)}}, "least, most"),
    ({"fields": ["similarity"]}, "limits by name"),
    ({"fields": None}, "limits by name"),
    ({"min_chars": float("nan")}, "0 or more"),
    ({"min_chars": 9, "max_chars": 5}, "no text has both"),
    ({"max_aspect": 0.5}, "1 or more"),
    ({"script": ["latin"]}, "expected a text"),
    ({"pattern": b"d"}, "expected a text"),
    ({1: 2}, "'1'"),
    ("latin", "filters by name"),
    (["min_side"], "filters by name"),
    ({"fields": {"similarity": ("a", None)}}, "least, most"),
  ],
)
def test_filters_that_cannot_be_are_named(chosen, said):
  with pytest.raises(errors.ConfigError, match=said):
    filters.Filters.of(chosen)


def _kept(config, **chosen):
  """The filtered source, and its captions by the number of their image."""
  source = kinds.build(config | {"filters": chosen}, "train")
  captions = {}
  for i in range(source.num_examples("image_text")):
    image, text = source.example("image_text", i).parts
    captions[image.image] = text.text
  return source, captions


def test_images_and_examples_are_those_that_all_filters_keep(config):
  source, captions = _kept(
    config, min_side=20, max_aspect=1.6, without="http", min_chars=3
  )
  whole = kinds.build(config, "train")
  assert source.num_images == whole.num_images
  sizes = image_sizes.of(whole)
  expected = {}
  for i, (height, width) in enumerate(sizes.tolist()):
    for text in whole.captions(i):
      if height <= 1.6 * width and "http" not in text and len(text) >= 3:
        expected[i] = text
  assert captions == expected
  # An image without a caption stays, one whose caption is left out does not.
  assert source.usable.tolist() == [
    i
    for i, size in enumerate(sizes.tolist())
    if max(size) <= 1.6 * min(size) and (i in expected or not whole.captions(i))
  ]
  assert isinstance(source, examples.Source)
  assert source.fingerprint() == whole.fingerprint()  # its codes fit
  assert source.contents() != contents.of(whole)
  assert all("http" not in t for i in captions for t in source.captions(i))


def test_samples_are_kept_by_numbers_of_their_json(config):
  source, captions = _kept(config, fields={"similarity": (0.15, 0.35)})
  expected = [i for i in range(24) if i % 5 in (2, 3) and i != 7]
  assert source.usable.tolist() == expected
  assert set(captions) <= set(expected)
  none = {"name": (0, None)}  # a text, not a number
  with pytest.raises(errors.DataError, match="filters keep none"):
    _kept(config, fields=none)
  with pytest.raises(errors.DataError, match=r"sample has no \['likeness'\]"):
    _kept(config, fields={"likeness": (0, None)})


def test_batches_hold_kept_images_alone(config):
  source, _ = _kept(config, max_aspect=1.6)
  for batches in (
    pipeline.image_batches(source, 4, seed=1),
    pipeline.image_batches(source, 4),
    bucket_rows.batches(source, ((8, 8),), 4, seed=1),
    bucket_rows.batches(source, ((8, 8),), 4),
  ):
    index = np.concatenate([batches[k]["index"] for k in range(4)])
    valid = np.concatenate([batches[k]["valid"] for k in range(4)]) > 0
    assert set(index[valid]) == set(source.usable)


def test_a_choice_that_cannot_be_kept_is_used(config, monkeypatch, caplog):
  monkeypatch.setattr(filtered, "_KEPT", 5)
  real = stored.keep

  def refused(file, of, parts):
    real(file.parent / "file" if of == "what filters keep" else file, of, parts)

  (stored.folder() / "filters" / "file").mkdir(parents=True)
  monkeypatch.setattr(stored, "keep", refused)
  source, _ = _kept(config, max_aspect=1.6)
  assert len(source.usable)
  assert "Set LAVIT_INDEXES" in caplog.text


def test_a_read_that_fails_is_not_a_choice(config, monkeypatch):
  """Nor kept: the next start chooses among all."""
  real = webdataset.WebDatasetSource._read

  def read(self, i, block, size):
    if i == 3:
      raise OSError("the disk is away")
    return real(self, i, block, size)

  monkeypatch.setattr(webdataset.WebDatasetSource, "_read", read)
  with pytest.raises(errors.DataError, match=r"003 cannot be read .*is away"):
    _kept(config, fields={"similarity": (0, None)})
  monkeypatch.undo()


def test_a_changed_json_is_chosen_anew(config, monkeypatch):
  monkeypatch.setattr(filtered, "_KEPT", 5)
  chosen = {"fields": {"similarity": (0.35, 0.45)}}
  first, _ = _kept(config, **chosen)
  path = pathlib.Path(config["path"])
  data = path.read_bytes()
  changed = data.replace(b'"similarity": 0.4', b'"similarity": 0.1')
  assert changed != data
  path.write_bytes(changed.replace(b'"similarity": 0.0', b'"similarity": 0.4'))
  again, _ = _kept(config, **chosen)
  assert set(first.usable) & set(again.usable) == set()
  assert len(again.usable) >= 4


def test_texts_alone_have_no_json(config, tmp_path):
  rows = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9))
  (tmp_path / "a.jsonl").write_text(rows)
  config |= {"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}
  config |= {"held_out_path": config["path"]}
  source, _ = _kept(config, min_side=3, pattern="[3-5]")
  assert source.num_examples("text") == 3
  with pytest.raises(errors.ConfigError, match="no images with such"):
    _kept(config, fields={"score": (0, None)})


def test_other_kinds_have_no_fields(config, tmp_path):
  Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "0.png")
  row = {"image": "0.png", "caption": "a cat"}
  (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
  config |= {"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}
  config |= {"held_out_path": config["path"]}
  assert _kept(config, min_side=9)[1] == {0: "a cat"}
  with pytest.raises(errors.ConfigError, match="no images with such fields"):
    _kept(config, fields={"similarity": (0, None)})


def test_each_source_of_a_mixture_has_its_own_filters(config):
  del config["kind"]
  part = {"kind": "webdataset", "path": config["path"]}
  config |= {"kind": "", "mixture": {"image_text": 1.0}, "filters": {}}
  config["sources"] = {
    "all": part,
    "short": part | {"filters": {"max_chars": 10}},
  }
  source, held_out = kinds.pair(config)
  whole, short = (p.source.num_examples("image_text") for p in source.parts)
  assert whole > short > 0
  assert held_out.num_examples("image_text") == whole + short


@pytest.mark.parametrize("damage", [None, b"junk", b""])
def test_what_is_kept_of_many_is_computed_once(
  config, monkeypatch, damage, caplog
):
  monkeypatch.setattr(filtered, "_KEPT", 5)
  chosen = dict(min_chars=5, max_aspect=1.6, fields={"similarity": (0, 0.35)})
  first, captions = _kept(config, **chosen)
  made = []
  real = filtered.FilteredSource._choose
  monkeypatch.setattr(
    filtered.FilteredSource,
    "_choose",
    lambda self: made.append(1) or real(self),
  )
  (file,) = (stored.folder() / "filters").glob("*.npz")
  if damage is not None:
    file.write_bytes(damage)
  with caplog.at_level(logging.WARNING):
    again, same = _kept(config, **chosen)
  assert len(made) == (damage is not None)
  assert ("damaged" in caplog.text) == (damage is not None)
  assert same == captions
  assert again.usable.tolist() == first.usable.tolist()
  _kept(config, **chosen | {"min_chars": 6})
  assert len(made) == (damage is not None) + 1
