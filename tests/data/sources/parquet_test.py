"""Parquet files as a Source: every layout, in place, into a packed batch."""

import io
import json
import os
import random
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lavit_jax.core import errors, image_io, vocabulary
from lavit_jax.data import contents, examples
from lavit_jax.data.batching import pipeline
from lavit_jax.data.images import image_bytes
from lavit_jax.data.indexes import stored
from lavit_jax.data.indexes.tables import arrow_rows, kept
from lavit_jax.data.indexes.tables import tables as tables_lib
from lavit_jax.data.indexes.tables.parquet import pages, reader
from lavit_jax.data.records import table_rows
from lavit_jax.data.sources import jsonl, kinds
from lavit_jax.data.sources.tables import parquet
from tests.data import fakes
from tests.data.indexes import table_files
from tests.train import fake_gcs

LONG = "words " * 20


@pytest.fixture(autouse=True)
def _indexes(tmp_path, monkeypatch):
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "kept"))
  # Pages are read one by one, as of larger files; where that is not possible,
  # as of lists and in an object store, PyArrow reads whole row groups.
  monkeypatch.setattr(reader, "_SMALL", 0)


@pytest.fixture
def folder(tmp_path):
  """Three files of four images with captions, in row groups of three."""
  return table_files.captioned(tmp_path / "data", 3)


def opened(path, **kwargs):
  return parquet.ParquetSource(path, 16, quiet=True, **kwargs)


def write(tmp_path, columns, **kwargs):
  return table_files.parquet(tmp_path / "a.parquet", columns, **kwargs)


def every_example(source):
  return [
    source.example(task, i)
    for task in source.tasks()
    for i in range(source.num_examples(task))
  ]


def config(path, **fields):
  return dict(kind="parquet", path=str(path), image_size=16, seed=0) | fields


def test_rows_are_images_with_captions(folder):
  source = opened(folder)
  assert (source.num_images, source.num_rows) == (12, 12)
  assert source.image_key(7) == "1.parquet:3"
  assert source.captions(7) == ["image 7"]
  assert source.encoded(7) == table_files.encoded(7)
  expected = image_io.to_uint8(image_io.load(table_files.encoded(7)), 16)
  np.testing.assert_array_equal(source.image(7), expected)
  for protocol in (
    examples.Source,
    examples.HasEncodedImages,
    examples.HasStorage,
    examples.HasFingerprint,
    examples.HasContents,
  ):
    assert isinstance(source, protocol)
  assert source.tasks() == ("image_text", "text_image")
  assert source.num_examples("image_text") == 12
  assert source.num_examples("vqa") == 0
  example = source.example("text_image", 7)
  assert example.key == "1.parquet:3"
  assert example.parts == (
    examples.TextPart("image 7"),
    examples.ImagePart(7, write=True),
  )
  with pytest.raises(IndexError):
    source.encoded(12)


def test_a_null_caption_and_an_empty_one_are_none(tmp_path):
  """`datasets` and pandas write null for what is absent."""
  columns = {
    "image": table_files.embedded(4),
    "caption": ["a", None, "", " d "],
  }
  source = opened(write(tmp_path, columns, image="image"))
  assert source.num_images == 4
  assert [source.captions(i) for i in range(4)] == [["a"], [], [], ["d"]]
  assert source.example("image_text", 1).parts[0].image == 3


def test_images_outside_of_the_file_are_beside_it(tmp_path):
  """`to_parquet` of datasets 5.2.0 writes bytes null and an absolute path."""
  for i in range(2):
    (tmp_path / f"{i}.png").write_bytes(table_files.encoded(i))
  paths = ["0.png", str(tmp_path / "1.png"), "gone.png", "../x.png", None]
  cells = [{"bytes": None, "path": path} for path in paths]
  columns = {"image": cells, "caption": list("abcde")}
  path = write(tmp_path, columns, image="image")
  with pytest.raises(errors.DataError, match=r"a\.parquet:1 \(image '/.*out"):
    opened(path)
  source = opened(path, limit_share=0.6)
  assert source.faults.names.keys() == {f"a.parquet:{i}" for i in (1, 3, 4)}
  assert "allow_absolute" in source.faults.reasons["a.parquet:1"]
  assert source.encoded(0) == tmp_path / "0.png"
  assert source.image(0).shape == (16, 16, 3)
  with pytest.raises(image_io.ImageError, match=r"a\.parquet:2 .*no such file"):
    source.image(1)
  source = opened(path, limit_share=0.6, allow_absolute=True)
  expected = image_io.to_uint8(image_io.load(table_files.encoded(1)), 16)
  np.testing.assert_array_equal(source.image(1), expected)
  columns = {"image": [{"bytes": None, "path": "gone.png"}], "text": ["a"]}
  path = write(tmp_path, columns, image="image")
  with pytest.raises(errors.DataError, match="none of its first 1 images"):
    opened(path)


def test_a_path_stands_in_for_bytes_that_are_missing(tmp_path):
  """In one row group some may be embedded; what is wrong is told at access."""
  (tmp_path / "1.png").write_bytes(table_files.encoded(1))
  cells = [
    *table_files.embedded(1),
    {"bytes": None, "path": "1.png"},
    {"bytes": None, "path": "/etc/x.png"},
    {"bytes": None, "path": None},
    {"bytes": b"", "path": "a.png"},
    {"bytes": b"no image", "path": None},
  ]
  columns = {"image": cells, "caption": list("abcdef")}
  source = opened(write(tmp_path, columns, rows=9, image="image"))
  assert source.num_images == 6
  assert source.encoded(0) == table_files.encoded(0)
  assert source.encoded(1) == tmp_path / "1.png"
  for i, said in (
    (2, "a.parquet:2: image '/etc/x.png' lies outside"),
    (3, "a.parquet:3: holds neither an image nor the path of one"),
    (4, "a.parquet:4: has no bytes"),
    (5, "a.parquet:5: is no image of a known format"),
  ):
    with pytest.raises(image_io.ImageError, match=said):
      source.image(i)
  assert image_bytes.of(source)  # no bad image stops a run


def test_rows_without_an_image_are_texts(tmp_path):
  cells = [*table_files.embedded(1), None]
  columns = {"image": cells, "text": ["a caption", "words alone"]}
  source = opened(write(tmp_path, columns, image="image"))
  assert source.num_images == 1
  assert source.captions(0) == ["a caption"]
  assert source.example("text", 0).parts == (examples.TextPart("words alone"),)


def test_texts_may_be_plain_bytes(tmp_path):
  """Spark and others write texts without saying that they are some."""
  (tmp_path / "b.png").write_bytes(table_files.encoded(1))
  kind = pa.struct([("bytes", pa.binary()), ("path", pa.binary())])
  columns = {
    "image": [
      {"bytes": table_files.encoded(0), "path": b"a.png"},
      {"bytes": None, "path": b"b.png"},
      {"bytes": None, "path": b"\xff.png"},
    ],
    "caption": [b"a", "\u00e9".encode(), b"c"],
  }
  types = {"image": kind, "caption": pa.binary()}
  for rows in (1, 3):
    path = write(tmp_path, columns, types=types, rows=rows)
    source = opened(path, limit_share=0.5)
    assert source.num_images == 3 if rows == 3 else 2
    assert source.encoded(0) == table_files.encoded(0)
    assert source.encoded(1) == tmp_path / "b.png"
    assert source.captions(1) == ["\u00e9"]
  with pytest.raises(image_io.ImageError, match=r"2: .*not UTF-8"):
    source.image(2)


@pytest.mark.parametrize("name", ["image", "img", "jpg", "image_bytes"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_column_of_bytes_holds_images(tmp_path, name, kind):
  data = [table_files.encoded(i) for i in range(5)]
  columns = {name: [*data, None], "caption": [f"c{i}" for i in range(6)]}
  path = write(tmp_path, columns, types={name: kind})
  source = opened(path)
  assert source.num_images == 6  # that one is null is not seen before
  assert [source.encoded(i) for i in range(6)] == [*data, b""]
  with pytest.raises(image_io.ImageError, match=r"parquet:5: holds neither"):
    source.image(5)


def test_bytes_that_are_null_in_a_whole_row_group_are_absent(tmp_path):
  data = [table_files.encoded(i) for i in range(3)]
  columns = {"image": [*data, None, None], "text": list("abcde")}
  path = write(tmp_path, columns, types={"image": pa.binary()})
  source = opened(path)
  assert (source.num_images, source.num_examples("text")) == (3, 2)


@pytest.mark.parametrize("name", ["image", "file_name", "filename"])
def test_a_column_of_paths_holds_images(tmp_path, name):
  (tmp_path / "in").mkdir()
  for i in range(3):
    (tmp_path / "in" / f"{i}.png").write_bytes(table_files.encoded(i))
  columns = {name: [f"in/{i}.png" for i in range(3)], "txt": list("abc")}
  source = opened(write(tmp_path, columns))
  assert source.encoded(2) == tmp_path / "in" / "2.png"
  assert source.captions(2) == ["c"]
  assert source.image(2).shape == (16, 16, 3)


def test_several_images_of_a_row_are_each_an_image(tmp_path):
  """Its words belong to the first; messages say where each belongs."""
  first, second, third = table_files.embedded(3)
  columns = {
    "images": [[first, None, second], [], [third], None],
    "text": ["two of them", "no image", "one", "none"],
  }
  source = opened(write(tmp_path, columns, images="images"))
  assert source.num_images == 3
  keys = [source.image_key(i) for i in range(3)]
  assert keys == ["a.parquet:0[0]", "a.parquet:0[1]", "a.parquet:2"]
  data = [source.encoded(i) for i in range(3)]
  assert data == [table_files.encoded(i) for i in range(3)]
  assert [source.captions(i) for i in range(3)] == [
    ["two of them"],
    [],
    ["one"],
  ]
  assert source.num_examples("text") == 2
  columns = {
    "images": [[first, second], [third]],
    "question": ["which?", "what?"],
    "answer": ["this", "that"],
  }
  source = opened(write(tmp_path, columns, images="images"), limit_share=0.5)
  assert (
    "about 2 images; write messages" in source.faults.reasons["a.parquet:0"]
  )
  assert source.example("vqa", 0).parts[0].image == 0


def test_messages_take_the_images_of_their_row_in_order(tmp_path):
  content = [
    {"type": "image", "text": None},
    {"type": "image", "text": None},
    {"type": "text", "text": "Which is older?"},
  ]
  answer = [{"type": "text", "text": "The second."}]
  messages = [
    {"role": "user", "content": content},
    {"role": "assistant", "content": answer},
  ]
  columns = {
    "images": [table_files.embedded(2), table_files.embedded(1)],
    "messages": [messages, messages],
  }
  path = write(tmp_path, columns, images="images")
  source = opened(path, limit_share=0.5)
  assert "more images than the 1" in source.faults.reasons["a.parquet:1"]
  assert source.num_images == 2
  (example,) = [source.example("document", 0)]
  assert example.parts == (
    examples.ImagePart(0, write=False, weight=0.0),
    examples.ImagePart(1, write=False, weight=0.0),
    examples.TextPart("Which is older?", weight=0.0),
    examples.TextPart("The second.", end=True),
  )
  assert source.encoded(1) == table_files.encoded(1)


def test_bytes_within_messages_are_neither_loaded_nor_taken_for_words(tmp_path):
  part = {"type": "image", "text": None, "image": table_files.embedded(1)[0]}
  words = {"type": "text", "text": "words", "image": None}
  part["image"]["path"] = None
  talk = [{"role": "assistant", "content": [words]}]
  columns = {"messages": [talk, [{"role": "user", "content": [part]}]]}
  source = opened(write(tmp_path, columns), limit_share=0.5)
  assert source.example("document", 0).parts[0].text == "words"
  assert "expected a path" in source.faults.reasons["a.parquet:1"]


def test_texts_of_the_name_of_messages_are_none(tmp_path):
  columns = {"document": ["words"] * 2, "text": ["other"] * 2}
  path = write(tmp_path, columns)
  assert opened(path).example("text", 0).parts[0].text == "other"
  source = opened(path, text_column="document")
  assert source.example("text", 0).parts[0].text == "words"


def test_rows_are_learnt_as_json_lines_are(tmp_path):
  """Of each field; a row that holds bytes in place of a path is the same."""
  for i in range(3):
    (tmp_path / f"{i}.png").write_bytes(table_files.encoded(i))
  talk = [
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "A cat"},
  ]
  columns = {
    "caption": [["a", "b", ""], ["c"], None],
    "questions": [
      [{"question": "q?", "answer": "x"}, {"question": "r?", "answer": "y"}],
      None,
      None,
    ],
    "edits": [None, [{"instruction": "paint it", "image": "2.png"}], None],
    "conversations": [None, None, talk],
  }
  rows = [
    {"image": f"{i}.png"} | {name: columns[name][i] for name in columns}
    for i in range(3)
  ]
  (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
  theirs = jsonl.JsonlSource(tmp_path / "a.jsonl", 16)
  columns["image"] = table_files.embedded(3)
  ours = opened(write(tmp_path, columns, image="image"))
  assert ours.tasks() == theirs.tasks()
  assert ours.num_images == 4  # 2.png also as what an edit makes
  assert ours.questions(0) == theirs.questions(0) != []
  for one, two in zip(every_example(ours), every_example(theirs), strict=True):
    assert one.task == two.task
    for mine, other in zip(one.parts, two.parts, strict=True):
      if isinstance(mine, examples.TextPart):
        assert mine == other
      else:
        assert (mine.write, mine.weight) == (other.write, other.weight)
        np.testing.assert_array_equal(
          ours.image(mine.image), theirs.image(other.image)
        )


def test_a_sequence_of_questions_may_be_a_record_of_lists(tmp_path):
  """So `datasets` stores Sequence({"question": …, "answer": …})."""
  columns = {
    "image": table_files.embedded(2),
    "questions": [
      {"question": ["a?", "b?"], "answer": ["x", "y"]},
      {"question": ["a?", "b?"], "answer": ["x"]},
    ],
  }
  source = opened(write(tmp_path, columns, image="image"), limit_share=0.5)
  assert source.questions(0) == [("any", "a?", "x"), ("any", "b?", "y")]
  assert "different lengths" in source.faults.reasons["a.parquet:1"]


def test_numbers_beside_nulls_stay_exact(tmp_path):
  """Grain's Parquet reader turns them to float64: 2**53 + 1 is lost."""
  columns = {
    "image": table_files.embedded(2),
    "question": ["how many?"] * 2,
    "answer": [2**53 + 1, None],
    "caption": [None, "a"],
  }
  source = opened(write(tmp_path, columns, image="image"), limit_share=0.5)
  assert source.questions(0) == [("any", "how many?", "9007199254740993")]


def test_classes_are_captions_by_their_names(tmp_path):
  columns = {"img": table_files.embedded(4), "label": [1, 0, -1, 7]}
  path = write(tmp_path, columns, img="image", label=["cat", "dog"])
  source = opened(path, limit_share=0.25)
  assert [source.captions(i) for i in range(3)] == [["dog"], ["cat"], []]
  assert "label is 7, expected one of 2" in source.faults.reasons["a.parquet:3"]
  columns["caption"] = ["a"] * 4  # words are better than a class
  path = write(tmp_path, columns, img="image", label=["cat", "dog"])
  assert opened(path).captions(3) == ["a"]
  columns = {"image": table_files.embedded(2), "question": ["what?"] * 2}
  columns["answer"] = [1, 0]
  path = write(tmp_path, columns, image="image", answer=["cat", "dog"])
  assert opened(path).questions(0) == [("any", "what?", "dog")]


def test_sounds_are_no_images(tmp_path):
  """`datasets` stores them as it does images."""
  columns = {"audio": table_files.embedded(2), "text": ["a", "b"]}
  made = table_files.table(columns, audio="image")
  info = {"info": {"features": {"audio": {"_type": "Audio"}}}}
  made = made.replace_schema_metadata({"huggingface": json.dumps(info)})
  pq.write_table(made, tmp_path / "a.parquet")
  source = opened(tmp_path / "a.parquet")
  assert (source.num_images, source.tasks()) == (0, ("text",))


def test_images_are_found_without_the_words_of_datasets(tmp_path):
  """A table that pandas has read and written has lost its features."""
  columns = {"photo": table_files.embedded(4), "caption": list("abcd")}
  path = write(tmp_path, columns, photo="image", caption="string")
  assert opened(path).captions(3) == ["d"]
  schema = pq.read_schema(table_files.without_words(path))
  assert b"huggingface" not in schema.metadata
  assert schema.field("caption").type == pa.large_string()
  source = opened(path)
  for i in range(4):
    assert source.encoded(i) == table_files.encoded(i)
    assert source.captions(i) == ["abcd"[i]]
  (tmp_path / "0.png").write_bytes(table_files.encoded(0))
  cells = [{"bytes": None, "path": "0.png"}] * 2
  columns = {"photo": cells, "caption": ["a", "b"]}
  path = write(tmp_path, columns, photo="image")
  schema = pq.read_schema(table_files.without_words(path))
  assert schema.field("photo").type.field("bytes").type == pa.null()
  assert opened(path).encoded(1) == tmp_path / "0.png"
  columns = {"photo": table_files.embedded(1), "label": [1]}
  path = write(tmp_path, columns, photo="image", label=["cat", "dog"])
  assert opened(table_files.without_words(path)).captions(0) == []


@pytest.mark.parametrize(
  "more",
  [
    # FineWeb, Dolma, RedPajama: as their cards have them.
    {
      "id": ["<urn:uuid:1>"] * 3,
      "dump": ["CC-MAIN-2013-20"] * 3,
      "url": ["http://a.b/c.html"] * 3,
      "date": ["2013-05-18T05:48:54Z"] * 3,
      "file_path": ["s3://commoncrawl/a.warc.gz"] * 3,
      "language": ["en"] * 3,
      "language_score": [0.9] * 3,
      "token_count": [3] * 3,
    },
    {
      "id": ["1"] * 3,
      "source": ["reddit"] * 3,
      "added": ["2023-04-11"] * 3,
      "created": ["2013-05-18"] * 3,
      "metadata": [{"lang": "en", "score": 0.1}] * 3,
    },
    {
      "meta": ['{"pred_label": "__label__cc"}'] * 3,
      "red_pajama_subset": ["c4"] * 3,
    },
  ],
)
def test_texts_alone_are_documents_of_text(tmp_path, more):
  columns = {"text": ["one", "two\n", "three <image>"], **more}
  source = opened(write(tmp_path, columns))
  assert (source.num_images, source.tasks()) == (0, ("text",))
  texts = [source.example("text", i).parts[0].text for i in range(3)]
  assert texts == ["one", "two", "three <image>"]
  assert source.example("text", 2).key == "a.parquet:2"


def _picture(mode, **kwargs):
  """An image of another kind than 8-bit RGB, encoded."""
  file = io.BytesIO()
  if mode == "exif":
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), (255, 0, 0)).save(file, "JPEG", exif=exif)
  elif mode == "I;16":
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(file, "TIFF")
  else:
    Image.new("RGB", (4, 4), (9, 200, 30)).convert(mode).save(file, **kwargs)
  return file.getvalue()


def test_the_bytes_say_what_an_image_is(tmp_path):
  """`datasets` stores 16-bit, CMYK and palette images as TIFF."""
  data = {
    "exif": _picture("exif"),
    "sixteen": _picture("I;16"),
    "palette": _picture("P", format="TIFF"),
    "cmyk": _picture("CMYK", format="TIFF"),
    "gif": _picture("P", format="GIF"),
    "one bit": _picture("1", format="PNG"),
  }
  cells = [{"bytes": one, "path": "a.jpg"} for one in data.values()]
  columns = {"image": cells, "caption": list(data)}
  source = opened(write(tmp_path, columns, image="image"))
  for i, one in enumerate(data.values()):
    expected = image_io.to_uint8(image_io.load(one), 16)
    np.testing.assert_array_equal(source.image(i), expected)
  assert image_io.load(source.encoded(0)).size == (4, 8)  # turned upright
  assert len(np.unique(source.image(1))) > 20  # not white
  # Colours, not the palette's indices.
  assert np.abs(source.image(2)[0, 0].astype(int) - [9, 200, 30]).max() < 30


def test_the_columns_that_are_meant_can_be_named(tmp_path):
  columns = {
    "before": table_files.embedded(2),
    "after": table_files.embedded(2, 5),
    "TEXT": ["a", "b"],
  }
  path = write(tmp_path, columns, before="image", after="image")
  with pytest.raises(errors.DataError, match=r"'before', 'after'.*_feature"):
    opened(path)
  with pytest.raises(errors.DataError, match=r"'TEXT': write it 'text'"):
    opened(path, image_column="after")
  source = opened(path, image_column="after", text_column="TEXT")
  assert source.encoded(0) == table_files.encoded(5)
  assert source.captions(0) == ["a"]
  with pytest.raises(errors.DataError, match=r"no column 'x'.*'TEXT'"):
    opened(path, image_column="x")
  columns = {"image": table_files.embedded(1), "TEXT": [3]}
  path = write(tmp_path, columns, image="image")
  with pytest.raises(errors.DataError, match=r"'TEXT'.* holds no images"):
    opened(path, image_column="TEXT")
  talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
  columns = {"talk": [talk], "text": ["x"]}
  source = opened(write(tmp_path, columns), text_column="talk")
  assert source.tasks() == ("document",)
  columns = {
    "image": table_files.embedded(1),
    "caption": ["the default"],
    "text": ["another"],
  }
  path = write(tmp_path, columns, image="image")
  assert opened(path).captions(0) == ["the default"]
  assert opened(path, text_column="text").captions(0) == ["another"]


def test_columns_that_are_not_read_are_named_once(tmp_path, caplog):
  columns = {
    "image": table_files.embedded(3),
    "caption": list("abc"),
    "alt_words": ["some words"] * 3,
    "url": ["http://a.b"] * 3,
    "mask": table_files.embedded(3),
  }
  path = write(tmp_path, columns, image="image", mask="image")
  for _ in range(2):  # found by the index, too
    caplog.clear()
    opened(path)
    (record,) = caplog.records
    assert "not read: 'alt_words' ('some words')" in record.getMessage()


@pytest.mark.parametrize(
  ("columns", "types", "said"),
  [
    ({"score": [1.0]}, {}, "no column that is read"),
    ({"URL": ["http://a.b/c.jpg"], "text": ["a"]}, {}, "no image.*http://a"),
    ({"image_url": ["http://a.b/c"], "text": ["a"]}, {}, "looks like one"),
    ({"Caption": ["a"], "image": ["a.png"]}, {}, "'Caption': write it 'cap"),
    ({"image": ["http://a.b/c.jpg"], "text": ["a"]}, {}, "web address"),
  ],
)
def test_what_would_be_taken_for_something_else_is_refused(
  tmp_path, columns, types, said
):
  path = write(tmp_path, columns, types=types)
  with pytest.raises(errors.DataError, match=said):
    opened(path)


def test_splits_divide_the_rows_whatever_else_there_is(folder):
  names = {}
  for split in ("all", "train", "held_out"):
    source = opened(folder, split=split, held_out_share=0.4)
    names[split] = [source.image_key(i) for i in range(source.num_images)]
  assert sorted(names["train"] + names["held_out"]) == names["all"]
  assert names["train"]
  assert names["held_out"]
  some = opened(folder / "1.parquet", split="held_out", held_out_share=0.4)
  for i in range(some.num_images):
    assert some.image_key(i) in names["held_out"]
  with pytest.raises(errors.ConfigError, match="split='test'"):
    opened(folder, split="test")


def test_digests_change_with_what_they_cover(folder):
  def digests():
    source = opened(folder)
    return (
      examples.fingerprint(source),
      contents.of(source),
      image_bytes.of(source),
    )

  def rewrite(start, caption):
    columns = {
      "image": table_files.embedded(4, start),
      "caption": [f"{caption} {k}" for k in range(4)],
    }
    table_files.parquet(folder / "0.parquet", columns, image="image")

  before = digests()
  assert digests() == before
  rewrite(0, "other")
  names, texts, _ = digests()
  assert names == before[0]
  assert texts != before[1]
  rewrite(40, "other")
  assert digests()[1] == texts
  assert digests()[2] != before[2]
  (folder / "0.parquet").rename(folder / "9.parquet")
  assert digests()[0] != names


def test_bad_rows_are_counted_and_too_many_are_refused(tmp_path, caplog):
  columns = {
    "image": [*table_files.embedded(28), None, None],
    "caption": ["fine"] * 30,
  }
  path = write(tmp_path, columns, image="image")
  with pytest.raises(errors.DataError, match=r"2 of 30 rows.*a\.parquet:28"):
    opened(path)
  source = opened(path, limit_share=0.1)
  assert (source.faults.seen, source.faults.bad) == (30, 2)
  assert "holds no image" in source.faults.reasons["a.parquet:29"]
  assert "skipped 2 from rows of a.parquet, such as a.parquet:28" in caplog.text
  assert source.num_examples("image_text") == 28


def test_texts_that_are_not_utf8_are_bad_rows(tmp_path):
  texts = pa.array([b"fine", b"\xff\xfe", b"good"], pa.binary())
  made = pa.table({"text": texts.view(pa.string())})
  pq.write_table(made, tmp_path / "a.parquet")
  source = opened(tmp_path / "a.parquet", limit_share=0.5)
  assert source.num_examples("text") == 2
  assert "cannot be read" in source.faults.reasons["a.parquet:1"]
  made = pa.table({"text": texts})  # Spark writes texts as plain bytes
  pq.write_table(made, tmp_path / "a.parquet")
  source = opened(tmp_path / "a.parquet", limit_share=0.5)
  assert source.num_examples("text") == 2
  assert "not UTF-8" in source.faults.reasons["a.parquet:1"]


def test_files_without_rows_are_refused(tmp_path):
  with pytest.raises(errors.DataError, match="no usable row"):
    opened(write(tmp_path, {"text": []}, types={"text": pa.string()}))


def test_row_groups_without_rows_are_passed_over(tmp_path):
  made = table_files.table({"text": ["a", "b", "c"]})
  path = tmp_path / "a.parquet"
  with pq.ParquetWriter(path, made.schema) as writer:
    for part in (made[:0], made[:1], made[:0], made[1:], made[:0]):
      writer.write_table(part)
  assert pq.read_metadata(path).num_row_groups == 5
  source = opened(path)
  texts = [source.example("text", i).parts[0].text for i in range(3)]
  assert texts == ["a", "b", "c"]


@pytest.mark.parametrize(
  ("data", "said"),
  [
    (b"", "no Parquet file: it begins with b''"),
    (b"PAR1", "cut off or damaged"),
    (b"PAR1" + bytes(50), "cut off or damaged"),
    (b'{"image": "a.jpg"}', "no Parquet file"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    (b"PARE" + bytes(50), "encrypted"),
  ],
)
def test_other_files_are_named_with_what_to_do(tmp_path, data, said):
  (tmp_path / "a.parquet").write_bytes(data)
  with pytest.raises(errors.DataError, match=said) as caught:
    opened(tmp_path / "a.parquet")
  assert str(tmp_path / "a.parquet") in str(caught.value)


def test_paths_that_name_nothing_are_refused(tmp_path, folder):
  with pytest.raises(errors.DataError, match=r"no file .*gone"):
    opened(tmp_path / "gone.parquet")
  with pytest.raises(errors.DataError, match="names no Parquet file"):
    opened(tmp_path)
  (tmp_path / "pipe").mkdir()
  os.mkfifo(tmp_path / "pipe" / "a.parquet")
  with pytest.raises(errors.DataError, match="is no file"):
    opened(tmp_path / "pipe" / "a.parquet")
  for pattern in ("{0..1}.parquet", "[01].parquet", "{0,1}*"):
    assert opened(folder / pattern).num_images == 8
  (folder / "train-00000-of-00001.parquet").write_bytes(b"")
  (folder / "test-00000-of-00001.parquet").write_bytes(b"")
  with pytest.raises(errors.DataError, match=r"splits test, train.*train\*"):
    opened(folder)


def _mutated(rng, whole):
  """Bytes with some changed, removed or added; most of them near the end."""
  data = bytearray(whole)
  for _ in range(rng.choice((1, 1, 2, 5, 20))):
    at = rng.randrange(len(data))
    if rng.random() < 0.5:
      at = max(0, len(data) - 1 - rng.randrange(3000))
    how = rng.randrange(6)
    if how < 3:
      data[at] = rng.randrange(256)
    elif how == 3:
      del data[at : at + rng.randint(1, 50)]
    elif how == 4:
      data[at:at] = rng.randbytes(rng.randint(1, 50))
    else:
      del data[at:]
    if len(data) < 100:
      break
  return bytes(data)


def read_all(open_):
  """Reads all of a source; words in place of what cannot be read."""
  said = []
  try:
    source = open_()
  except errors.DataError as error:
    return [str(error)]
  for i in range(source.num_images):
    try:
      source.image(i)
    except image_io.ImageError as error:
      said.append(str(error))
  every_example(source)
  return said


def test_mutated_files_are_read_or_refused_in_words(tmp_path):
  columns = {
    "image": table_files.embedded(5),
    "caption": [f"{LONG}{i}" for i in range(5)],
    "questions": [[{"question": "q?", "answer": "x"}]] * 5,
  }
  whole = write(tmp_path, columns, image="image").read_bytes()
  path, rng, outcomes = tmp_path / "b.parquet", random.Random(0), set()
  for _ in range(120):
    path.write_bytes(_mutated(rng, whole))
    said = read_all(lambda: opened(path, limit_share=1.0))
    assert all("b.parquet" in words for words in said)
    outcomes |= {words.partition("(")[0][-40:] for words in said} or {"read"}
  assert len(outcomes) > 4


def test_damage_among_the_images_is_told_at_access(tmp_path):
  columns = {"image": table_files.embedded(4), "caption": list("abcd")}
  options = {
    "write_page_checksum": True,
    "use_dictionary": False,
    "compression": "none",
  }
  path = write(tmp_path, columns, image="image", options=options)
  data = bytearray(path.read_bytes())
  data[data.index(table_files.encoded(1)) + 60] ^= 1
  path.write_bytes(data)
  source = opened(path)
  assert source.captions(1) == ["b"]
  with pytest.raises(image_io.ImageError, match=r"a\.parquet:1: .*damaged"):
    source.image(1)
  assert source.image(3).shape == (16, 16, 3)  # of another row group


@pytest.mark.parametrize("how", ["cut", "written anew", "replaced"])
def test_a_file_that_changes_while_it_is_read_is_named(folder, how):
  source = opened(folder)
  source.image(0)
  if how == "cut":
    with open(folder / "2.parquet", "r+b") as file:
      file.truncate(600)
  else:
    path = folder / ("2.parquet" if how == "written anew" else "new")
    columns = {"image": table_files.embedded(4), "caption": ["x"] * 4}
    table_files.parquet(path, columns, image="image")
    os.replace(path, folder / "2.parquet")
  with pytest.raises(image_io.ImageError, match=r"2\.parquet:1: .*has changed"):
    source.image(9)
  with pytest.raises(errors.DataError, match=r"2\.parquet has changed"):
    source.captions(9)
  assert source.captions(1) == ["image 1"]
  if how != "cut":
    assert opened(folder).captions(9) == ["x"]


def test_a_file_that_changes_while_it_is_open_is_named(folder):
  source = opened(folder)
  source.image(9)
  with open(folder / "2.parquet", "r+b") as file:
    file.truncate(600)
  with pytest.raises(image_io.ImageError, match="has changed"):
    source.image(11)
  with pytest.raises(errors.DataError, match="has changed"):
    source.captions(11)


def test_threads_read_what_one_thread_reads(folder, monkeypatch):
  """With almost nothing kept, so that all is opened and dropped all along."""
  monkeypatch.setattr("lavit_jax.data.sources.tables.source._OPEN", 1)
  monkeypatch.setattr("lavit_jax.data.sources.tables.source._TEXTS", 1)
  monkeypatch.setattr("lavit_jax.data.sources.tables.source._IMAGES", 1)
  source = opened(folder)
  expected = [(table_files.encoded(i), [f"image {i}"]) for i in range(12)]
  wrong = []

  def read(seed):
    for i in np.random.default_rng(seed).integers(0, 12, 100):
      if (source.encoded(i), source.captions(i)) != expected[i]:
        wrong.append(i)

  threads = [threading.Thread(target=read, args=(s,)) for s in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_a_row_takes_a_few_bytes_of_memory(tmp_path):
  count = 50_000
  columns = {
    "image": pa.array([{"bytes": b"x" * 40, "path": None}] * count),
    "caption": [f"number {i}" if i % 9 else None for i in range(count)],
  }
  path = write(tmp_path, columns, rows=1000)
  opened(path)
  tracemalloc.start()
  source = opened(path, split="train")
  taken, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert source.num_images > 0.88 * count
  assert taken < 16 * count
  assert peak < 100 * count


def test_no_bytes_of_images_are_read_for_the_index(tmp_path, monkeypatch):
  """Nor columns that mean nothing here."""
  rng = np.random.default_rng(0)
  columns = {
    "image": [{"bytes": rng.bytes(50_000), "path": f"{i}"} for i in range(40)],
    "caption": [f"caption {i}" for i in range(40)],
    "embedding": [rng.random(1000).tolist() for _ in range(40)],
  }
  options = {"compression": "none", "use_dictionary": ["caption"]}
  path = write(tmp_path, columns, rows=10, image="image", options=options)
  sizes, real = [], tables_lib.Bytes.read

  def read(self, start, stop):
    data = real(self, start, stop)
    sizes.append(len(data))
    return data

  monkeypatch.setattr(tables_lib.Bytes, "read", read)
  source = opened(path)
  assert sum(sizes) < 0.1 * path.stat().st_size
  sizes.clear()
  source.captions(5)
  assert sum(sizes) < 0.1 * path.stat().st_size
  assert source.encoded(5) == columns["image"][5]["bytes"]
  assert sum(sizes) < 0.4 * path.stat().st_size  # of its row group
  sizes.clear()
  monkeypatch.setattr(pages, "_LARGE", 0)
  assert source.encoded(25) == columns["image"][25]["bytes"]
  assert sum(sizes) < 60_000  # its own


def test_rows_that_are_plain_are_found_alike_quickly(folder, monkeypatch):
  columns = {
    "text": ["a", None, "c <image>", " ", "e"] * 3,
    "image": [*table_files.embedded(14), None],
  }
  write(folder, columns, image="image", rows=4)
  write(folder / "text", {"text": ["a", " b ", "", None, "<image>"]})
  paths = [*folder.glob("*.parquet"), folder / "text" / "a.parquet"]

  def scanned(again):
    found = []
    for path in paths:
      source = opened(path, limit_share=1.0)
      (index,) = kept.of(source.tables)
      more = every_example(source), source.contents(), source.faults.reasons
      found.append((index.scanned.columns.tolist(), *more, again))
    return [part[:-1] for part in found]

  quick = scanned(0)
  monkeypatch.setattr(arrow_rows.Rows, "plain", lambda self: None)
  monkeypatch.setattr(table_rows.Reader, "_quick", lambda self, values: None)
  for file in stored.folder().rglob("*.rows"):
    file.unlink()
  assert scanned(1) == quick


def test_the_index_is_made_once_and_again_when_damaged(
  folder, monkeypatch, caplog
):
  made, real = [], kept.scan.of
  monkeypatch.setattr(
    kept.scan, "of", lambda t, f: (made.append(f.name), real(t, f))[1]
  )
  before = opened(folder)
  opened(folder)
  assert sorted(made) == ["0.parquet", "1.parquet", "2.parquet"]
  (file,) = stored.folder().rglob("1.parquet.*.rows")
  data = file.read_bytes()
  flipped = bytearray(data)
  flipped[-3] ^= 1
  for damage in (data[:-5], bytes(flipped), b"{" + data, b"", data + b"x"):
    made.clear()
    file.write_bytes(damage)
    after = opened(folder)
    assert made == ["1.parquet"]
    assert after.contents() == before.contents()
    assert "damaged" in caplog.text
  made.clear()
  os.utime(folder / "1.parquet")  # as good as another file
  opened(folder)
  assert made == ["1.parquet"]
  opened(folder, allow_absolute=True)  # is read in another way
  assert len(made) == 4


def test_a_folder_of_indexes_that_cannot_be_written_is_named(
  folder, tmp_path, monkeypatch
):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "file"))
  with pytest.raises(errors.DataError, match="Set LAVIT_INDEXES"):
    opened(folder)


def test_pyarrow_is_asked_for_where_it_is_missing(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(errors.DataError, match=r"'lavit_jax\[parquet\]'"):
    opened(folder)


def test_numbers_of_a_row_are_there_for_filters(tmp_path):
  columns = {
    "image": table_files.embedded(5),
    "caption": list("abcde"),
    "similarity": [0.1, 0.5, None, 0.9, 0.3],
    "width": [3, 4, 5, 6, 7],
    "embedding": [[0.1] * 3] * 5,
    "url": ["http://a.b"] * 5,
  }
  source = opened(write(tmp_path, columns, image="image"))
  assert source.fields(3) == {"similarity": 0.9, "width": 6}
  assert source.fields(2) == {"similarity": None, "width": 5}
  assert isinstance(source, examples.HasFields)
  data = config(tmp_path / "a.parquet", held_out_path="x")
  data["filters"] = {"fields": {"similarity": (0.3, None)}}
  kept = kinds.build(data, "train")
  assert kept.usable.tolist() == [1, 3, 4]


def test_other_kinds_of_data_do_not_import_pyarrow():
  code = (
    "import sys; from lavit_jax.data.sources import kinds;"
    "assert 'pyarrow' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_config_builds_both_splits(folder, caplog):
  train, held_out = kinds.pair(config(folder / "{0..2}.parquet"))
  assert train.num_images + held_out.num_images == 12
  assert "nine tenths by hash" in kinds.describe(config(folder), "train", train)
  assert not caplog.text
  apart = config(
    folder / "[01].parquet", held_out_path=str(folder / "2.parquet")
  )
  train, held_out = kinds.pair(apart)
  assert (train.num_images, held_out.num_images) == (8, 4)
  assert not caplog.text
  (folder / "link").symlink_to(folder)
  apart["held_out_path"] = str(folder / "link" / "[12].parquet")
  kinds.pair(apart)
  assert "4 of 8 held-out rows are in the training data" in caplog.text
  with pytest.raises(errors.ConfigError, match=r"path is empty.*train-\*"):
    kinds.build(config(""), "train")
  assert kinds.kind_of(folder) == "parquet"
  assert kinds.kind_of(folder / "{0..2}.parquet") == "parquet"
  (folder / "0.parquet").rename(folder / "plain")
  assert kinds.kind_of(folder / "plain") == "parquet"
  assert kinds.kind_of("my.jsonl") == "jsonl"


def test_rows_are_packed_into_batches(tmp_path, folder):
  """A bad image loses its weight, and nothing else."""
  columns = {
    "image": [{"bytes": b"no image", "path": "x.png"}],
    "caption": ["of a bad one"],
  }
  table_files.parquet(folder / "9.parquet", columns, image="image")
  source = parquet.ParquetSource(folder, fakes.SIZE)
  text = fakes.Words()
  batches = pipeline.packed_rows(
    source,
    fakes.Cache([3] * source.num_images),
    text,
    vocabulary.Vocabulary(text.size, fakes.CODES),
    mixture={"image_text": 1, "text_image": 1},
    length=64,
    slots=4,
    batch_size=2,
    window=28,
    limit_share=0.2,
  )
  words, reads = set(), 0
  for k in range(8):
    batch = batches[k]
    words |= set(batch["tokens"].ravel().tolist())
    reads += int(batch["keep"].any(axis=-1).sum())
  assert reads >= 12
  captions = [f"image {i}" for i in range(12)]
  assert {i for caption in captions for i in text.encode(caption)} <= words
  assert batches.faults[1].names.keys() == {"9.parquet:0"}


def test_files_of_an_object_store_are_read_in_place(folder, monkeypatch):
  columns = {"file_name": ["a/x.png"], "text": ["beside it"]}
  table_files.parquet(folder / "9.parquet", columns)
  (folder / "a").mkdir()
  (folder / "a" / "x.png").write_bytes(table_files.encoded(50))
  with fake_gcs.serving(monkeypatch) as store:
    fake_gcs.upload(store, folder, "gs://bucket/data")
    source = opened("gs://bucket/data")
    here = opened(folder)
    assert source.num_images == here.num_images == 13
    for i in (0, 5, 11):
      assert source.image_key(i) == here.image_key(i)
      assert source.captions(i) == here.captions(i)
      assert source.encoded(i) == here.encoded(i)
    np.testing.assert_array_equal(source.image(12), here.image(12))
    assert examples.fingerprint(source) == examples.fingerprint(here)
    assert opened("gs://bucket/data/{1,2}.parquet").num_images == 8
    data = (folder / "1.parquet").read_bytes()
    store.pipe_file("gs://bucket/data/1.parquet", data[:-100])
    with pytest.raises(errors.DataError, match=r"gs://.*1\.parquet.*cut off"):
      opened("gs://bucket/data/{1,2}.parquet")
    store.rm_file("/bucket/data/1.parquet")
    with pytest.raises(errors.DataError, match=r"no file gs://.*1\.parquet"):
      opened("gs://bucket/data/{1,2}.parquet")
