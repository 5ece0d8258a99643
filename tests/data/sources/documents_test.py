"""Documents, dialogues and edits of other projects, from files to batches."""

import json
import os
import pathlib

import numpy as np
import pyarrow as pa
import pytest

from lavit_jax.core import vocabulary
from lavit_jax.data import examples
from lavit_jax.data.batching import pipeline
from lavit_jax.data.sources import jsonl
from lavit_jax.data.sources.tables import hf, parquet
from tests.data import fakes
from tests.data.indexes import table_files

_BYTES = pa.list_(pa.binary())
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


@pytest.fixture(autouse=True)
def _indexes(tmp_path, monkeypatch):
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "kept"))


def _shown(source, example):
  out = []
  for part in example.parts:
    if isinstance(part, examples.TextPart):
      out.append(part.text + ("</s>" if part.end else ""))
    else:
      out.append(source.image_key(part.image) + ("*" if part.write else ""))
  return out


def _packed(source, cache=None, length=64):
  """Returns the first rows of a source, and the log of its faults."""
  batches = pipeline.packed_rows(
    source,
    cache or fakes.Cache([3] * source.num_images),
    fakes.Words(),
    vocabulary.Vocabulary(fakes.Words.size, fakes.CODES),
    mixture=dict.fromkeys(source.tasks(), 1.0),
    length=length,
    slots=4,
    batch_size=4,
    window=16,
  )
  return batches[0], batches


def _of_table(tmp_path, columns, types=None, rows=3):
  path = tmp_path / "a.parquet"
  table_files.parquet(path, columns, types, rows=rows)
  return parquet.ParquetSource(path, fakes.SIZE, quiet=True)


def _image(i):
  return table_files.encoded(i)


def test_obelics_with_images_in_the_table(tmp_path):
  source = _of_table(
    tmp_path,
    {
      "images": [[None, _image(0), None], [_image(1), None]],
      "texts": [["One.", None, "Two."], [None, "Three."]],
      "metadata": ["[null, {}, null]"] * 2,
    },
    {"images": _BYTES},
  )
  assert source.tasks() == ("document",)
  shown = [_shown(source, source.example("document", i)) for i in range(2)]
  assert shown == [["One.", "a.parquet:0", "Two."], ["a.parquet:1", "Three."]]
  assert source.encoded(1) == _image(1)
  batch, _ = _packed(source)
  assert batch["keep"].any()


def test_the_cauldron_in_a_table(tmp_path):
  turn = pa.struct([("user", pa.string()), ("assistant", pa.string())])
  source = _of_table(
    tmp_path,
    {
      "images": [table_files.embedded(2)],
      "texts": [[{"user": "Which?", "assistant": "This."}]],
    },
    {"images": pa.list_(table_files.IMAGE), "texts": pa.list_(turn)},
  )
  assert _shown(source, source.example("document", 0)) == [
    *("a.parquet:0[0]", "a.parquet:0[1]", "Which?", "This.</s>")
  ]


def test_bagel_in_a_table(tmp_path):
  source = _of_table(
    tmp_path,
    {
      "image_list": [[_image(0), _image(1)], [_image(2), _image(3), _image(4)]],
      "instruction_list": [[["red", "in red"]], [["x"], ["y"]]],
    },
    {
      "image_list": _BYTES,
      "instruction_list": pa.list_(pa.list_(pa.string())),
    },
  )
  assert source.tasks() == ("edit", "document")
  edits = [source.example("edit", i) for i in range(2)]
  assert _shown(source, edits[1]) == [
    *("a.parquet:0[0]", "in red", "a.parquet:0[1]*")
  ]
  assert _shown(source, source.example("document", 0)) == [
    *("a.parquet:1[0]", "x", "a.parquet:1[1]*", "y", "a.parquet:1[2]*")
  ]
  assert [source.encoded(i) for i in range(5)] == [_image(i) for i in range(5)]
  assert _packed(source)[0]["weights"].any()


def test_pairs_of_edits_in_a_table(tmp_path):
  source = _of_table(
    tmp_path,
    {
      "input_image": table_files.embedded(2),
      "edit": ["paint it", "turn it"],
      "output_image": table_files.embedded(2, start=5),
    },
    {"input_image": table_files.IMAGE, "output_image": table_files.IMAGE},
  )
  assert source.num_examples("edit") == 2
  assert _shown(source, source.example("edit", 1)) == [
    *("a.parquet:1[0]", "turn it", "a.parquet:1[1]*")
  ]
  assert source.encoded(3) == _image(6)


def test_pairs_of_answers_in_a_table(tmp_path):
  say = lambda role, content: [{"role": role, "content": content}]
  source = _of_table(
    tmp_path,
    {
      "images": [table_files.embedded(1)],
      "prompt": [say("user", "<image>Hi?")],
      "chosen": [say("assistant", "Yes.")],
      "rejected": [say("assistant", "No.")],
      "prompt_id": ["abc"],
    },
    {
      "images": pa.list_(table_files.IMAGE),
      **dict.fromkeys(("prompt", "chosen", "rejected"), pa.list_(_MESSAGE)),
    },
  )
  assert _shown(source, source.example("document", 0)) == [
    *("a.parquet:0", "Hi?", "Yes.</s>")
  ]


def test_pages_of_text_in_a_table(tmp_path):
  source = _of_table(
    tmp_path,
    {"raw_content": ["One page.", "Another."], "url": ["http://a", "http://b"]},
  )
  assert source.tasks() == ("text",)
  assert _shown(source, source.example("text", 1)) == ["Another."]


def test_a_web_page_is_of_use_without_an_image_that_is_gone(tmp_path):
  """An image that a dialogue is about is not."""
  rows = [
    {"images": [None, "0.png", None], "texts": ["red one", None, "cat"]},
    {"messages": [{"role": "user", "content": "<image> what"},
                  {"role": "assistant", "content": "cat"}],
     "images": ["1.png"]},
  ]  # fmt: skip
  path = tmp_path / "a.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "0.png").write_bytes(_image(0))
  source = jsonl.JsonlSource(path, fakes.SIZE)
  batch, batches = _packed(source, fakes.Cache([-1, -1]))
  words = batch["tokens"].ravel().tolist()
  assert set(fakes.Words().encode("red one cat")) <= set(words)
  assert not batch["keep"].any()
  assert batches.faults[0].names.keys() == {"a.jsonl:2"}


def test_an_image_folder_with_a_text_beside_each(tmp_path):
  folder = tmp_path / "10_dogs"
  (folder / "more").mkdir(parents=True)
  for i, name in enumerate(["a.png", "b.jpg", "more/c.png"]):
    (folder / name).write_bytes(_image(i))
  (folder / "a.txt").write_text("a red dog\n")
  (folder / "more" / "c.txt").write_text("a dog\nand a cat")
  source = hf.HfSource(folder, fakes.SIZE, quiet=True)
  captions = [source.captions(i) for i in range(3)]
  assert captions == [["a red dog"], [], ["a dog\nand a cat"]]
  (folder / "a.txt").write_text("a blue dog")  # is noticed
  assert hf.HfSource(folder, fakes.SIZE, quiet=True).captions(0) == [
    "a blue dog"
  ]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["mmc4", "obelics"])
def test_real_documents_say_the_same_in_each_form(name):
  folder = pathlib.Path(os.environ["LAVIT_SHARED"], "data", "E_interleaved")
  source = jsonl.JsonlSource(folder / f"{name}.jsonl", fakes.SIZE)
  ours = jsonl.JsonlSource(folder / "index.jsonl", fakes.SIZE)
  assert source.num_examples("document") == ours.num_examples("document") == 169
  assert {source.image_key(i) for i in range(source.num_images)} == {
    ours.image_key(i) for i in range(ours.num_images)
  }
  for i in range(169):
    images = [
      [s.image_key(p.image) for p in s.example("document", i).parts
       if isinstance(p, examples.ImagePart)]
      for s in (source, ours)
    ]  # fmt: skip
    assert images[0] == images[1]
    if name == "obelics":
      texts = [
        "\n".join(p.text for p in s.example("document", i).parts
                if isinstance(p, examples.TextPart)).split()
        for s in (source, ours)
      ]  # fmt: skip
      assert texts[0] == texts[1]
  batch, batches = _packed(source, length=1024)
  assert batch["keep"].any()
  assert not batches.faults[0].bad
  assert np.isfinite(batch["weights"]).all()
