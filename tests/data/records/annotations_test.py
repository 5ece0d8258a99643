"""Annotations of COCO's and Karpathy's forms, as a source of captions."""

import gzip
import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from lavit_jax.core import errors
from lavit_jax.data.sources import jsonl

_IMAGES = [
  {"id": 7, "file_name": "7.png", "height": 4, "width": 4},
  {"id": 9, "file_name": "9.png", "coco_url": "http://x/9.png"},
  {"id": 11, "file_name": "11.png"},
]
_COCO = {
  "info": {"year": 2017},
  "licenses": [],
  "images": _IMAGES,
  "annotations": [
    {"image_id": 9, "id": 1, "caption": "a dog"},
    {"image_id": 7, "id": 2, "caption": "a cat"},
    {"image_id": 9, "id": 3, "caption": "a dog runs"},
    {"image_id": 99, "id": 4, "caption": "of no image here"},
  ],
}
_KARPATHY = {
  "images": [
    {
      "filepath": "val2014",
      "filename": "9.png",
      "imgid": 0,
      "split": "restval",
      "sentences": [{"tokens": ["a"], "raw": "a dog"}, {"raw": "a dog runs"}],
      "cocoid": 9,
    }
  ],
  "dataset": "coco",
}


def _source(folder, value, images="", name="captions_val2017.json", **options):
  (folder / images).mkdir(exist_ok=True)
  for number in (7, 9, 11):
    pixels = np.full((4, 4, 3), number, np.uint8)
    Image.fromarray(pixels).save(folder / images / f"{number}.png")
  text = json.dumps(value, **options).encode()
  packed = gzip.compress(text) if name.endswith(".gz") else text
  (folder / name).write_bytes(packed)
  return jsonl.JsonlSource(folder / name, 4)


def _captions(source):
  return {
    int(source.image(i)[0, 0, 0]): source.captions(i)
    for i in range(source.num_images)
  }


@pytest.mark.parametrize("images", ["", "images", "val2017"])
@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("captions_val2017.json", {}),
    ("captions_val2017.json", {"indent": 2}),
    ("captions_val2017.json.gz", {}),
  ],
)
def test_coco_s_annotations_are_captions(tmp_path, images, name, options):
  source = _source(tmp_path, _COCO, images, name, **options)
  assert _captions(source) == {7: ["a cat"], 9: ["a dog", "a dog runs"], 11: []}
  assert source.num_examples("image_text") == 3
  assert not source.faults.bad


def test_the_order_of_the_fields_does_not_matter(tmp_path):
  for names in (
    ("images", "annotations"),
    ("annotations", "images"),
    ("type", "images", "annotations"),
  ):
    value = {"type": "captions"} | _COCO
    source = _source(tmp_path, {name: value[name] for name in names})
    assert source.num_examples("image_text") == 3, names


@pytest.mark.parametrize("first", ["images", "dataset"])
def test_karpathy_s_splits_are_captions(tmp_path, first):
  value = {first: _KARPATHY[first]} | _KARPATHY
  source = _source(tmp_path, value, "val2014", "dataset_coco.json")
  assert _captions(source) == {9: ["a dog", "a dog runs"]}


def test_what_cannot_be_used_is_named(tmp_path):
  boxes = _COCO | {"annotations": [{"image_id": 7, "bbox": [0, 0, 1, 1]}]}
  with pytest.raises(errors.DataError, match=r"without a caption.*boxes"):
    _source(tmp_path, boxes)
  bad = _COCO | {"images": [*_IMAGES, {"id": 3}, {"id": 4, "file_name": 5}]}
  with pytest.raises(errors.DataError, match=r"2 of 5 lines .*:4"):
    _source(tmp_path, bad)


def test_json_lines_that_begin_so_are_lines(tmp_path):
  rows = [{"info": "x", "text": f"words {i}"} for i in range(3)]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "a.jsonl").write_text(text)
  source = jsonl.JsonlSource(tmp_path / "a.jsonl", 4)
  assert source.num_examples("text") == 3


def test_a_cut_file_is_refused_in_words(tmp_path):
  text = json.dumps(_COCO, indent=1)
  path = tmp_path / "captions.json"
  for cut in range(30, len(text) - 1, 97):
    path.write_text(text[:cut])
    with pytest.raises(errors.DataError):
      jsonl.JsonlSource(path, 4)


@pytest.mark.shared
@pytest.mark.skipif(
  not os.environ.get("LAVIT_SHARED"), reason="needs LAVIT_SHARED"
)
def test_annotations_as_coco_has_them():
  folder = pathlib.Path(os.environ["LAVIT_SHARED"]) / "data" / "A_coco"
  source = jsonl.JsonlSource(folder / "captions_coco_format.json", 32)
  own = jsonl.JsonlSource(folder / "index.jsonl", 32)
  assert source.num_images == 390
  assert source.num_examples("image_text") == 1951
  captions = {source.image_key(i): source.captions(i) for i in range(390)}
  for i in range(own.num_images):
    assert sorted(captions[own.image_key(i)]) == sorted(own.captions(i))
