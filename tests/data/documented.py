"""Writes small data under the names that docs/data.md has for them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.indexes import table_files, tars

_BYTES = pa.list_(pa.binary())


def _lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  text = "".join(json.dumps(row) + "\n" for row in rows)
  path.write_text(text)
  return text.encode()


def _images(folder, names):
  folder.mkdir(parents=True, exist_ok=True)
  for i, name in enumerate(names):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(tars.jpeg(i, size=(20, 30)))


def write(root):
  """Writes all of them but those of TFDS."""
  _images(root, ["cat.jpg", "before.jpg", "after.jpg", "a.jpg", "b.jpg"])
  say = lambda role, text: {"role": role, "content": text}
  image = lambda name: {"type": "image", "image": name}
  _lines(
    root / "my.jsonl",
    [
      {"image": "cat.jpg", "captions": ["a cat on a sofa", "a sleeping cat"]},
      {
        "image": "before.jpg",
        "edits": [{"instruction": "make it red", "image": "after.jpg"}],
      },
      {"messages": ["Before:", image("a.jpg"), "After:", image("b.jpg")]},
      {"text": "words without an image"},
    ],
  )
  for k in range(2):
    text = _lines(root / "lines.tmp", [{"text": f"page {k} {i}"} for i in "ab"])
    path = root / "prose" / f"{k:02d}.jsonl.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pa.compress(text, codec="gzip", asbytes=True))
  _documents(root, say)
  _images(root / "coco" / "val2017", ["1.jpg", "2.jpg"])
  annotations = {
    "images": [{"id": k, "file_name": f"{k}.jpg"} for k in (1, 2)],
    "annotations": [{"image_id": k, "caption": f"a {k}"} for k in (1, 2)],
  }
  path = root / "coco" / "captions_val2017.json"
  path.write_text(json.dumps(annotations))
  tars.shards(root / "web", 2)
  rows = {"url": ["http://a.org/1.jpg"], "status": ["failed_to_download"]}
  pq.write_table(pa.table(rows), root / "web" / "00000.parquet")
  table_files.captioned(root / "tables", 2)
  for k in range(2):
    name = f"train-{k:05d}-of-00002.parquet"
    (root / "tables" / f"{k}.parquet").rename(root / "tables" / name)
  _folders(root)


def _documents(root, say):
  """Writes documents, dialogues and edits of other projects."""
  jpegs = [tars.jpeg(k) for k in range(3)]
  table_files.parquet(
    root / "obelics.parquet",
    {"images": [[None, jpegs[0], None]], "texts": [["One.", None, "Two."]]},
    {"images": _BYTES},
  )
  info = {"image_name": "a.jpg", "matched_text_index": 1, "matched_sim": 0.3}
  _lines(
    root / "mmc4.jsonl",
    [{"text_list": ["One.", "Two."], "image_info": [info]}],
  )
  turns = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
  ]
  dialogue = [{"id": "1", "image": "cat.jpg", "conversations": turns}]
  (root / "llava.json").write_text(json.dumps(dialogue))
  _lines(
    root / "preferences.jsonl",
    [
      {
        "images": ["cat.jpg"],
        "prompt": [say("user", "What is it?")],
        "chosen": [say("assistant", "A cat.")],
        "rejected": [say("assistant", "A dog.")],
      }
    ],
  )
  table_files.parquet(
    root / "bagel.parquet",
    {"image_list": [jpegs[:2]], "instruction_list": [[["red", "in red"]]]},
    {
      "image_list": _BYTES,
      "instruction_list": pa.list_(pa.list_(pa.string())),
    },
  )


def _folders(root):
  """Writes folders of `datasets` and of images."""
  _images(root / "my_dataset", ["0001.png", "more/0002.jpg"])
  listing = "file_name,caption\n0001.png,a cat\nmore/0002.jpg,a dog\n"
  (root / "my_dataset" / "metadata.csv").write_text(listing)
  columns = {"image": table_files.embedded(3), "caption": ["a", "b", "c"]}
  table_files.saved(root / "my_saved", columns, image="image", caption="string")
  _images(root / "my_pets", ["cat/0001.png", "dog/0002.jpg"])
  _images(root / "my_texts", ["0001.png", "0002.png"])
  (root / "my_texts" / "0001.txt").write_text("a cat\n")


def write_tfds(root):
  """Writes a data set of TFDS in its folder, without TensorFlow."""
  from tests.data.sources import tfds_test

  builder = tfds_test.TinyImages(
    data_dir=str(root / "tfds"), file_format="array_record"
  )
  builder.download_and_prepare()
  assert (root / "tfds" / "tiny_images" / "1.0.0").is_dir()
