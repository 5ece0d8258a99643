"""Folders of the library `datasets` as a Source, without that library."""

import json
import random

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from lavit_jax.core import errors, image_io, vocabulary
from lavit_jax.data import contents, examples
from lavit_jax.data.batching import pipeline
from lavit_jax.data.indexes import stored
from lavit_jax.data.sources import kinds
from lavit_jax.data.sources.tables import hf
from tests.data import fakes
from tests.data.indexes import table_files
from tests.train import fake_gcs


@pytest.fixture(autouse=True)
def _indexes(tmp_path, monkeypatch):
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "kept"))


def opened(path, **kwargs):
  return hf.HfSource(path, 16, quiet=True, **kwargs)


def captions(source):
  return [source.captions(i) for i in range(source.num_images)]


def columns(count=7, start=0):
  return {
    "image": table_files.embedded(count, start),
    "caption": [f"image {start + i}" for i in range(count)],
  }


def saved(folder, *args, **kwargs):
  return table_files.saved(
    folder, columns(*args), image="image", caption="string", **kwargs
  )


def pictures(folder, *names):
  for i, name in enumerate(names):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(table_files.encoded(i))
  return folder


def test_a_saved_dataset_is_read_in_place(tmp_path):
  source = opened(saved(tmp_path / "mine", files=2))
  assert (source.name, source.num_images) == ("mine", 7)
  assert source.image_key(5) == "mine/data-00001-of-00002.arrow:1"
  for i in range(7):
    assert source.encoded(i) == table_files.encoded(i)
    assert source.captions(i) == [f"image {i}"]
  assert source.image(6).shape == (16, 16, 3)
  assert source.example("text_image", 6).parts == (
    examples.TextPart("image 6"),
    examples.ImagePart(6, write=True),
  )


def test_all_columns_of_a_saved_dataset_are_understood(tmp_path):
  """Nulls, lists of images, classes, messages; as in Parquet files."""
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "beside.png").write_bytes(table_files.encoded(9))
  one, two = table_files.embedded(2)
  talk = [
    {"from": "human", "value": "<image> and <image>?"},
    {"from": "gpt", "value": "Two"},
  ]
  rows = {
    "images": [
      [one, None, two],
      [{"bytes": None, "path": "beside.png"}],
      None,
      [one],
    ],
    "conversations": [talk, None, None, None],
    "label": [0, 1, 1, -1],
    "text": [None, "words", "words alone", None],
  }
  folder = table_files.saved(
    tmp_path / "a", rows, images="images", label=["cat", "dog"]
  )
  source = opened(folder)
  assert source.tasks() == ("image_text", "text_image", "document", "text")
  assert source.num_images == 4
  data = [source.encoded(i) for i in range(4)]
  assert data[:2] == [table_files.encoded(0), table_files.encoded(1)]
  assert data[2:] == [folder / "beside.png", table_files.encoded(0)]
  assert captions(source) == [[], [], ["words"], []]
  first, _, second, *_ = source.example("document", 0).parts
  assert (first.image, second.image) == (0, 1)
  rows = {"image": [one, two, one], "label": [0, 1, -1]}
  folder = table_files.saved(
    tmp_path / "b", rows, image="image", label=["cat", "dog"]
  )
  assert captions(opened(folder)) == [["cat"], ["dog"], []]


def test_classes_are_known_by_the_info_beside_the_files(tmp_path):
  folder = table_files.saved(
    tmp_path / "a",
    {"image": table_files.embedded(2), "label": [1, 0]},
    image="image",
    label=["cat", "dog"],
  )
  (file,) = folder.glob("*.arrow")
  with pa.memory_map(str(file)) as mapped:
    read = pa.ipc.open_stream(mapped).read_all()
    plain = pa.Table.from_pylist(
      read.to_pylist(), read.schema.remove_metadata()
    )
  with pa.ipc.new_stream(file, plain.schema) as writer:
    writer.write_table(plain)
  assert captions(opened(folder)) == [["dog"], ["cat"]]


def test_a_list_of_bytes_is_counted_without_reading_them(tmp_path):
  """Arrow's files say how long a list is; those of Parquet do not."""
  data = [[table_files.encoded(0), table_files.encoded(1)], [], None]
  rows = {"images": data, "text": ["a", "b", "c"]}
  types = {"images": pa.list_(pa.binary())}
  source = opened(table_files.saved(tmp_path / "a", rows, types=types))
  assert [source.encoded(i) for i in range(2)] == data[0]
  assert (source.num_images, source.num_examples("text")) == (2, 2)


def test_texts_that_are_not_utf8_are_bad_rows(tmp_path):
  texts = pa.array([b"fine", b"\xff\xfe", b"good"]).view(pa.string())
  folder = table_files.saved(tmp_path / "a", {"text": ["x"]})
  (file,) = folder.glob("*.arrow")
  made = pa.table({"text": texts})
  with pa.ipc.new_stream(file, made.schema) as writer:
    writer.write_table(made)
  source = opened(folder, limit_share=0.5)
  assert source.num_examples("text") == 2
  assert "cannot be read" in source.faults.reasons[f"a/{file.name}:1"]


def test_splits_of_its_own_are_those_of_a_run(tmp_path, caplog):
  folder = tmp_path / "dict"
  for split, count in (("train", 6), ("test", 2), ("extra", 1)):
    saved(folder / split, count, 10 * count)
  (folder / "dataset_dict.json").write_text(
    json.dumps({"splits": ["train", "test", "extra"]})
  )
  with pytest.raises(errors.DataError, match=r"train, test, extra.*dict/train"):
    opened(folder)
  config = dict(kind="hf", path=str(folder), image_size=16, seed=0)
  train, held_out = kinds.pair(config)
  assert (train.num_images, held_out.num_images) == (6, 2)
  assert "all of train: 6 images" in kinds.describe(config, "train", train)
  assert not caplog.text
  train, held_out = kinds.pair(config | {"held_out_split": "validation"})
  assert train.num_images + held_out.num_images == 6  # a part of train
  other = config | {"train_split": "extra", "held_out_split": "train"}
  assert [s.num_images for s in kinds.pair(other)] == [1, 6]
  with pytest.raises(errors.DataError, match=r"train_split='all'"):
    kinds.build(config | {"train_split": "all"}, "train")
  apart = config | {
    "path": str(folder / "train"),
    "held_out_path": str(folder / "extra"),
  }
  assert [s.num_images for s in kinds.pair(apart)] == [6, 1]
  assert kinds.kind_of(folder) == kinds.kind_of(folder / "train") == "hf"
  with pytest.raises(errors.ConfigError, match=r"path is empty.*datasets"):
    kinds.build(config | {"path": ""}, "train")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_images_beside_metadata(tmp_path, kind):
  """A picture without a row is left out; one that is missing is told of."""
  folder = pictures(tmp_path / "mine", "a.png", "in/b.png", "left_out.png")
  rows = [
    {"file_name": "a.png", "text": "001"},
    {"file_name": "in/b.png", "text": ""},
    {"file_name": "gone.png", "text": 'a, "quoted"\ncaption'},
  ]
  path = folder / f"metadata.{kind}"
  if kind == "csv":
    last = 'gone.png,"a, ""quoted""\ncaption"'
    path.write_text(f"file_name,text\na.png,001\nin/b.png,\n{last}\n")
  elif kind == "jsonl":
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  else:
    names = ("file_name", "text")
    table_files.parquet(path, {n: [row[n] for row in rows] for n in names})
  source = opened(folder)
  assert source.num_images == 3
  # pandas, by which `datasets` reads a CSV, makes 1.0 and None of the first.
  assert captions(source) == [["001"], [], ['a, "quoted"\ncaption']]
  assert source.image_key(1) == f"metadata.{kind}:1"
  assert source.encoded(1) == folder / "in" / "b.png"
  assert source.image(0).shape == (16, 16, 3)
  with pytest.raises(
    image_io.ImageError, match=r":2 .*gone\.png.*no such file"
  ):
    source.image(2)
  assert opened(path).num_images == 3  # the file itself
  assert kinds.kind_of(folder) == "hf"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
  "name", ["image_file_name", "file_names", "x_file_names"]
)
def test_other_names_of_the_images_column(tmp_path, kind, name):
  folder = pictures(tmp_path / "mine", "a.png", "b.png")
  several = name.endswith("s")
  value = ["a.png", "b.png"] if several and kind != "csv" else "a.png"
  path = folder / f"metadata.{kind}"
  if kind == "csv":
    path.write_text(f"{name},caption\n{value},words\n")
  elif kind == "jsonl":
    path.write_text(json.dumps({name: value, "caption": "words"}))
  else:
    table_files.parquet(path, {name: [value], "caption": ["words"]})
  source = opened(folder)
  assert source.captions(0) == ["words"]
  assert source.encoded(0) == folder / "a.png"
  assert source.num_images == (2 if isinstance(value, list) else 1)
  assert source.encoded(source.num_images - 1).name in ("a.png", "b.png")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_of_several_columns_of_images_one_is_named(tmp_path, kind):
  folder = pictures(tmp_path / "mine", "a.png", "b.png")
  row = {"old_file_name": "a.png", "new_file_name": "b.png", "text": "x"}
  path = folder / f"metadata.{kind}"
  if kind == "csv":
    path.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
  elif kind == "jsonl":
    path.write_text(json.dumps(row))
  else:
    table_files.parquet(path, {name: [row[name]] for name in row})
  with pytest.raises(errors.DataError, match=r"image_feature"):
    opened(folder)
  source = opened(folder, image_column="new_file_name")
  assert source.encoded(0) == folder / "b.png"
  assert captions(source) == [["x"]]


def test_two_kinds_of_metadata_are_refused(tmp_path):
  folder = pictures(tmp_path / "mine", "a.png")
  (folder / "metadata.csv").write_text("file_name\na.png\n")
  (folder / "metadata.jsonl").write_text('{"file_name": "a.png"}')
  with pytest.raises(errors.DataError, match=r"keep metadata of one kind"):
    opened(folder)


def test_metadata_of_folders_below_are_read_together(tmp_path):
  folder = pictures(tmp_path / "mine", "one/a.png", "two/a.png", "two/b.png")
  (folder / "one" / "metadata.csv").write_text("file_name,text\na.png,one\n")
  (folder / "two" / "metadata.csv").write_text(
    "file_name,text\na.png,two\nb.png,three\n"
  )
  source = opened(folder)
  assert captions(source) == [["one"], ["two"], ["three"]]
  assert source.encoded(1) == folder / "two" / "a.png"
  assert source.image_key(2) == "two/metadata.csv:1"
  (folder / "one").rename(folder / "test")
  (folder / "two").rename(folder / "train")
  config = dict(kind="hf", path=str(folder), image_size=16, seed=0)
  assert [source.num_images for source in kinds.pair(config)] == [2, 1]


def test_folders_of_classes_are_captions(tmp_path):
  names = ("cat/1.png", "cat/2.JPG", "old dog/3.png", "0.png", "cat/no.txt")
  folder = pictures(tmp_path / "mine", *names)
  (folder / ".cache").mkdir()
  (folder / ".cache" / "4.png").write_bytes(b"")
  source = opened(folder)
  assert captions(source) == [[], ["cat"], ["cat"], ["old dog"]]
  assert source.encoded(2) == folder / "cat" / "2.JPG"
  before = source.contents()
  (file,) = stored.folder().rglob("classes.jsonl")
  at = file.stat().st_mtime_ns
  assert opened(folder).contents() == before
  assert file.stat().st_mtime_ns == at  # nothing was written anew
  pictures(folder, "fish/5.png")
  assert captions(opened(folder))[-2:] == [["fish"], ["old dog"]]
  assert kinds.kind_of(folder) == "hf"


def test_one_folder_alone_is_no_class_and_annotations_are_named(
  tmp_path, caplog
):
  """As in the library: a folder called images says nothing of them."""
  folder = pictures(tmp_path / "mine", "images/1.png", "images/2.png")
  assert captions(opened(folder)) == [[], []]
  assert not caplog.records
  (folder / "llava.json").write_text("[]")
  (folder / "notes.csv").write_text("a,b\n")
  assert captions(opened(folder)) == [[], []]
  assert "llava.json and 1 more files" in caplog.text
  assert "give its path in place of the folder's" in caplog.text


def test_folders_of_splits_are_known_by_the_images_in_their_classes(tmp_path):
  folder = pictures(tmp_path / "mine", "train/cat/1.png", "test/dog/2.png")
  assert kinds.kind_of(folder) == "hf"
  with pytest.raises(errors.DataError, match="has the splits test, train"):
    opened(folder)


def test_what_is_no_dataset_is_refused(tmp_path):
  with pytest.raises(errors.DataError, match="There is no folder"):
    opened(tmp_path / "gone")
  (tmp_path / "mine").mkdir()
  with pytest.raises(errors.DataError, match=r"neither a state\.json"):
    opened(tmp_path / "mine")
  table_files.parquet(tmp_path / "mine" / "a.parquet", {"text": ["x"]})
  with pytest.raises(errors.DataError, match="kind='parquet' reads these"):
    opened(tmp_path / "mine")


@pytest.mark.parametrize(
  ("state", "said"),
  [
    ("{", "cannot be read as JSON"),
    ("[]", "no object"),
    ("{}", "list of Arrow files"),
    ({"_data_files": [{"filename": "../x.arrow"}]}, "list of Arrow files"),
    ({"_data_files": [{"filename": None}]}, "list of Arrow files"),
    ({"_data_files": [{"filename": "gone.arrow"}]}, "no file .*gone"),
    (
      {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_indices_data_files": [{"filename": "indices.arrow"}],
      },
      "choice of its rows",
    ),
  ],
)
def test_a_state_that_is_damaged_is_named(tmp_path, state, said):
  folder = saved(tmp_path / "mine")
  state = state if isinstance(state, str) else json.dumps(state)
  (folder / "state.json").write_text(state)
  with pytest.raises(errors.DataError, match=said):
    opened(folder)


def test_a_list_of_splits_that_is_damaged_is_named(tmp_path):
  (tmp_path / "dataset_dict.json").write_text('{"splits": ["../x"]}')
  with pytest.raises(errors.DataError, match="a list of splits"):
    opened(tmp_path)


def test_a_file_that_is_cut_off_anywhere_is_named(tmp_path):
  """Also behind a whole batch, where reading it would raise nothing."""
  folder = saved(tmp_path / "mine")
  (file,) = folder.glob("*.arrow")
  whole = file.read_bytes()
  ends = []
  with pa.memory_map(str(file)) as mapped:
    reader = pa.ipc.MessageReader.open_stream(mapped)
    for _ in range(4):  # the schema, and three batches
      reader.read_next_message()
      ends.append(mapped.tell())
  for size in (0, 3, 100, *ends, len(whole) // 2, len(whole) - 1):
    file.write_bytes(whole[:size])
    with pytest.raises(errors.DataError, match=r"\.arrow cannot be read as an"):
      opened(folder)


def _read_all(folder):
  """Reads all of a source; words in place of what cannot be read."""
  said = []
  try:
    source = opened(folder, limit_share=1.0)
  except errors.DataError as error:
    return [str(error)]
  for i in range(source.num_images):
    try:
      source.image(i)
    except image_io.ImageError as error:
      said.append(str(error))
  for task in source.tasks():
    for i in range(source.num_examples(task)):
      source.example(task, i)
  return said


def _mutated(rng, whole):
  data = bytearray(whole)
  for _ in range(rng.choice((1, 1, 2, 5, 20))):
    at = rng.randrange(len(data))
    how = rng.randrange(7)
    if how < 4:
      data[at] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
    elif how == 4:
      del data[at : at + rng.randint(1, 50)]
    else:
      data[at:at] = rng.randbytes(rng.randint(1, 50))
  return bytes(data)


def test_mutated_datasets_are_read_or_refused_in_words(tmp_path):
  folder = saved(tmp_path / "mine")
  (file,) = folder.glob("*.arrow")
  whole, rng, outcomes = file.read_bytes(), random.Random(0), set()
  for _ in range(120):
    file.write_bytes(_mutated(rng, whole))
    said = _read_all(folder)
    assert all("data-00000" in words for words in said)
    outcomes |= {words.partition("(")[0][-30:] for words in said} or {"read"}
  assert len(outcomes) > 2
  file.write_bytes(whole)
  for name in ("state.json", "dataset_info.json"):
    path = folder / name
    whole = path.read_bytes()
    for _ in range(40):
      path.write_bytes(_mutated(rng, whole))
      _read_all(folder)
    path.write_bytes(whole)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_mutated_metadata_are_read_or_refused_in_words(tmp_path, kind):
  folder = pictures(tmp_path / "mine", "a.png")
  rows = [{"file_name": "a.png", "text": f"words {i}"} for i in range(9)]
  text = "file_name,text\n" + 'a.png,"words, more"\n' * 9
  if kind == "jsonl":
    text = "".join(json.dumps(row) + "\n" for row in rows)
  path, rng, read = folder / f"metadata.{kind}", random.Random(0), 0
  for _ in range(100):
    path.write_bytes(_mutated(rng, text.encode()))
    said = _read_all(folder)
    read += not said
  assert 10 < read < 100


def test_bad_rows_of_metadata_are_counted(tmp_path):
  folder = pictures(tmp_path / "mine", "a.png")
  lines = [
    '{"file_name": "a.png", "text": "fine"}',
    "{",
    "[1]",
    '{"file_name": "a.png", "file_name": "b.png"}',
    '{"file_name": "../a.png"}',
    '{"file_name": "a.png", "text": "\\ud83d"}',
    "",
    '{"file_name": "a.png", "text": NaN}',
  ]
  (folder / "metadata.jsonl").write_text("\n".join(lines))
  source = opened(folder, limit_share=0.9)
  assert source.num_images == 2
  reasons = source.faults.reasons
  assert "is not JSON" in reasons["metadata.jsonl:1"]
  assert "is a JSON list" in reasons["metadata.jsonl:2"]
  assert "twice" in reasons["metadata.jsonl:3"]
  assert "lies outside the folder" in reasons["metadata.jsonl:4"]
  assert "half a character" in reasons["metadata.jsonl:5"]
  (folder / "metadata.jsonl").unlink()
  (folder / "metadata.csv").write_bytes(
    b"\xef\xbb\xbffile_name,text\r\na.png,fine\r\n\r\na.png\r\na.png,\xff\r\n"
    b'a.png,"never ends'
  )
  source = opened(folder, limit_share=0.9)
  assert (
    "has 1 cells, but the head names 2"
    in source.faults.reasons["metadata.csv:1"]
  )
  assert "half a character" in source.faults.reasons["metadata.csv:2"]
  assert captions(source) == [["fine"], ["never ends"]]
  (folder / "metadata.csv").write_text("a,a\n")
  with pytest.raises(errors.DataError, match="names its columns, each once"):
    opened(folder)


def test_numbers_of_a_row_are_there_for_filters(tmp_path):
  folder = pictures(tmp_path / "mine", "a.png")
  (folder / "metadata.csv").write_text(
    "file_name,score,text\nb\na.png,0.5,x\na.png,,y\n"
  )
  source = opened(folder, limit_share=0.5)
  assert source.fields(0)["score"] == 0.5
  assert "score" not in source.fields(1)
  (folder / "metadata.csv").unlink()
  (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "score": 7}')
  assert opened(folder).fields(0)["score"] == 7
  rows = columns(4) | {"score": [1, 2, 3, 4]}
  source = opened(table_files.saved(tmp_path / "a", rows, image="image"))
  assert [source.fields(i) for i in (0, 3)] == [{"score": 1}, {"score": 4}]


def test_long_metadata_are_read_by_blocks(tmp_path):
  folder = pictures(tmp_path / "mine", "a.png")
  count = 1000
  text = "file_name,text\n"
  for i in range(count):
    text += f'a.png,"line {i}\nof two"\n'
  (folder / "metadata.csv").write_text(text)
  source = opened(folder)
  assert source.num_images == count
  for i in np.random.default_rng(0).integers(0, count, 50).tolist():
    assert source.captions(i) == [f"line {i}\nof two"]
  assert source.captions(count - 1) == [f"line {count - 1}\nof two"]


def test_metadata_that_change_while_they_are_read_are_named(tmp_path):
  folder = pictures(tmp_path / "mine", "a.png")
  path = folder / "metadata.csv"
  path.write_text("file_name,text\n" + "a.png,one\n" * 600)
  source = opened(folder)
  path.write_text("file_name,text\n" + "a.png,other\n" * 600)
  with pytest.raises(errors.DataError, match=r"metadata\.csv has changed"):
    source.captions(599)
  folder = saved(tmp_path / "saved")
  source = opened(folder)
  source.image(0)
  (file,) = folder.glob("*.arrow")
  with open(file, "r+b") as stream:
    stream.truncate(600)  # what is mapped into memory is gone
  with pytest.raises(errors.DataError, match=r"arrow has changed"):
    source.captions(5)
  with pytest.raises(image_io.ImageError, match=r"arrow:5: .*has changed"):
    source.image(5)


def test_rows_that_name_a_file_stay_together(tmp_path):
  """Whatever row names it, as in JSON lines."""
  names = [f"{i}.png" for i in range(40)]
  folder = pictures(tmp_path / "mine", *names)
  rows = [
    {"file_name": name, "text": f"{name} {k}"}
    for k in range(3)
    for name in names
  ]
  rows += [
    {"file_names": [names[2 * i], names[2 * i + 1]], "text": "both"}
    for i in range(20)
  ]
  random.Random(1).shuffle(rows)
  (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
  files, total = {}, 0
  for split in ("train", "held_out"):
    source = opened(folder, split=split, held_out_share=0.3)
    files[split] = {source.encoded(i) for i in range(source.num_images)}
    total += source.num_rows
  assert total == len(rows)
  assert not files["train"] & files["held_out"]
  assert files["train"]
  assert len(files["held_out"]) > 4


def test_a_name_that_all_embedded_images_have_divides_nothing(tmp_path):
  rows = {
    "image": [
      {"bytes": table_files.encoded(i), "path": "image.png"} for i in range(40)
    ],
    "text": [f"{i}" for i in range(40)],
  }
  folder = table_files.saved(tmp_path / "a", rows, image="image")
  counts = [
    opened(folder, split=split).num_images for split in ("train", "held_out")
  ]
  assert sum(counts) == 40
  assert min(counts) > 0
  (tmp_path / "a" / "image.png").write_bytes(table_files.encoded(0))
  rows["image"] = [{"bytes": None, "path": "image.png"}] * 40
  folder = table_files.saved(tmp_path / "a", rows, image="image")
  assert opened(folder, split="train").num_images == 40  # one file: together
  with pytest.raises(errors.DataError, match=r"held_out_path"):
    opened(folder, split="held_out")


def test_rows_are_packed_into_batches(tmp_path):
  folder = pictures(tmp_path / "mine", "red/1.png", "red/2.png", "blue/3.png")
  source = hf.HfSource(folder, fakes.SIZE)
  text = fakes.Words()
  batches = pipeline.packed_rows(
    source,
    fakes.Cache([3] * source.num_images),
    text,
    vocabulary.Vocabulary(text.size, fakes.CODES),
    mixture={"image_text": 1},
    length=32,
    slots=4,
    batch_size=2,
    window=6,
  )
  words = {
    id_ for k in range(2) for id_ in batches[k]["tokens"].ravel().tolist()
  }
  assert {*text.encode("red"), *text.encode("blue")} <= words


def test_datasets_of_an_object_store(tmp_path, monkeypatch):
  """Arrow files are copied to this disk; the rest is read where it is."""
  saved(tmp_path / "data" / "saved", files=2)
  folder = pictures(tmp_path / "data" / "list", "in/a.png", "b.png")
  (folder / "metadata.csv").write_text(
    "file_name,text\nin/a.png,one\nb.png,2\n"
  )
  pictures(tmp_path / "data" / "classes", "cat/a.png", "dog/b.png")
  monkeypatch.setenv("LAVIT_FETCHED", str(tmp_path / "fetched"))
  with fake_gcs.serving(monkeypatch) as store:
    fake_gcs.upload(store, tmp_path / "data", "gs://bucket/data")
    for name in ("saved", "list", "classes"):
      there = opened(f"gs://bucket/data/{name}")
      here = opened(tmp_path / "data" / name)
      assert captions(there) == captions(here)
      for i in range(here.num_images):
        np.testing.assert_array_equal(there.image(i), here.image(i))
        assert there.image_key(i) == here.image_key(i)
      assert contents.of(there) == contents.of(here)
    with pytest.raises(errors.DataError, match="no folder gs://"):
      opened("gs://bucket/data/gone")
    store.rm_file("/bucket/data/saved/data-00000-of-00002.arrow")
    with pytest.raises(errors.DataError, match=r"lacks a file.*00000"):
      opened("gs://bucket/data/saved")


def test_exif_is_applied_and_16_bit_images_are_scaled(tmp_path):
  """As of every source: `datasets` turns images, and leaves I;16 as it is."""
  folder = tmp_path / "mine"
  folder.mkdir()
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.new("RGB", (8, 4), (255, 0, 0)).save(folder / "a.jpg", exif=exif)
  ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
  Image.fromarray(ramp).save(folder / "b.png")
  (folder / "metadata.csv").write_text("file_name\na.jpg\nb.png\n")
  source = opened(folder)
  assert image_io.load(source.encoded(0)).size == (4, 8)
  assert len(np.unique(source.image(1))) > 20
