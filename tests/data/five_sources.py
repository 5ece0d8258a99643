"""Five sources with filters, mixed and packed, for the tests of exactness."""

import json
import pathlib

import numpy as np
from PIL import Image

from lavit_jax.core import vocabulary
from lavit_jax.data.batching import pipeline
from lavit_jax.data.sources import kinds
from tests.data import fakes
from tests.data.indexes import tars

_WORDS = fakes.Words()
_VOCABULARY = vocabulary.Vocabulary(_WORDS.size, fakes.CODES)
_SIZE = 32  # pixels


def write(root, count=30):
  """Writes files, archives, texts, dialogues; returns config.data with scenes.

  Args:
    root: an empty folder.
    count: captions, and dialogues.
  """
  root, rng = pathlib.Path(root), np.random.default_rng(0)
  captions, dialogues = [], []
  for i in range(count):
    pixels = rng.integers(0, 255, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(root / f"{i}.png")
    words = " ".join(["red"] * int(rng.integers(1, 9)))
    captions.append({"image": f"{i}.png", "caption": words})
    turns = [{"question": f"what {k}", "answer": words} for k in range(i % 4)]
    dialogues.append({"image": f"{i}.png", "questions": turns or None})
  lengths = rng.integers(1, 90, 2 * count).tolist()
  texts = [{"text": "word " * length} for length in lengths]
  for name, rows in (
    ("captions", captions),
    ("dialogues", dialogues),
    ("texts", texts),
  ):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / f"{name}.jsonl").write_text(lines)
  (root / "web").mkdir()
  for s in range(3):
    tars.write(root / "web" / f"{s}.tar", _samples(s, count // 3))
  file = lambda name: {"kind": "jsonl", "path": str(root / f"{name}.jsonl")}
  return {
    "image_size": _SIZE,
    "seed": 3,
    "kind": "",
    "path": "",
    "held_out_path": "",
    "limit_share": 0.05,
    "filters": {},
    "train_size": count,
    "held_out_size": 10,
    "mixture": {"image_text": 1.0, "text_image": 0.7},
    "sources": {
      "captions": file("captions") | {"filters": {"min_chars": 8}},
      "web": {
        "kind": "webdataset",
        "path": str(root / "web"),
        "weight": 1.7,
        "filters": {"fields": {"similarity": (0.1, None)}, "max_aspect": 2.0},
      },
      "scenes": {"kind": "shapes", "mixture": {"edit": 1.0, "document": 0.3}},
      "texts": file("texts") | {"weight": 0.4, "mixture": {"text": 1.0}},
      "dialogues": file("dialogues") | {"mixture": {"vqa": 1.0}},
    },
  }


def _samples(shard, count):
  """Files of an archive, of which one sample in four is for a filter."""
  files = []
  for k in range(count):
    number = shard * count + k
    files += tars.sample(
      f"{number:06d}",
      f"image {number}",
      seed=number,
      meta={"similarity": number % 4 / 4},
    )
  return files


def batches(config, size):
  """Packed rows, as a process that has just begun makes them.

  The weight of the archives changes at document 64.

  Args:
    config: of `write`.
    size: rows a batch.
  """
  source = kinds.build(config, "train")
  caches = {}
  for part in source.parts:
    count = part.source.num_images
    counts = np.random.default_rng(count).integers(1, 6, count)
    caches[part.name] = fakes.Cache(counts) if count else None
  return pipeline.packed_rows(
    source,
    caches,
    _WORDS,
    _VOCABULARY,
    mixture=config["mixture"],
    length=48,
    slots=4,
    batch_size=size,
    window=32,
    seed=5,
    changes={64: {"web": 0.5}},
  )
