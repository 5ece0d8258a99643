"""How fast rows are planned from the lengths of documents, and then made.

  python benchmarks/data_plan.py [--documents 1000000] [--json]

Captions of 8 to 30 pieces with images of 50 to 140 visual tokens, read and
written, are packed into rows of 2048 positions and 16 images, in windows of
8192 documents, until a fifth of them is planned; and documents of 1 to 2048
positions, the hardest to pack. Then 300 rows of captions of COCO are made,
tokenized by a SentencePiece model, with code ids; images that are read are
blank, as decoding them is measured elsewhere. Times are of one core (CPU
seconds).
"""

import argparse
import datetime
import json
import pathlib
import tempfile
import time

import numpy as np

from lavit_jax.core import vocabulary
from lavit_jax.data import examples
from lavit_jax.data.batching import lengths, mixtures, packing, pipeline

_LIMITS = 2048, 16
_WINDOW = 8192
_PHOTOGRAPHS = pathlib.Path(__file__).parents[1] / "tests/data_files/coco"
_PHOTOGRAPHS /= "index.jsonl"


def main() -> None:
  """Prints millions of documents a minute, and the fill of rows, or JSON."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--documents", type=int, default=1_000_000, metavar="N")
  parser.add_argument("--json", action="store_true")
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  found = {
    "captions": _measure(*_captions(rng, args.documents)),
    "any length": _measure(*_any_length(rng, args.documents)),
    "rows": _rows(rng),
    "date": datetime.date.today().isoformat(),
  }
  if args.json:
    print(json.dumps(found))
    return
  for name in ("captions", "any length"):
    rate, fill = found[name]
    print(f"{name:10s} {rate:6.1f} M documents a minute, fill {fill:.3f}")
  print(f"rows       {found['rows']:6.1f} M tokens a second")


def _captions(rng, count):
  """Returns lengths of captions that read and that write an image."""
  text = rng.integers(8, 31, count).astype(np.int32)
  ends, images = np.arange(1, count + 1), np.arange(count, dtype=np.int32)
  columns = [
    lengths.Lengths(text, np.full(count, reads, np.int32), ends, images)
    for reads in (1, 0)
  ]
  return columns, rng.integers(50, 141, count).astype(np.int32)


def _any_length(rng, count):
  """Returns lengths of texts alone."""
  text = rng.integers(2, _LIMITS[0] + 2, count).astype(np.int32)
  none = np.zeros(count, np.int32)
  ends = np.zeros(count, np.int64)
  return [lengths.Lengths(text, none, ends, none[:0])], None


def _measure(columns, counts):
  """Returns (millions of documents a minute, positions in use)."""
  total = len(columns[0].text)
  stream = mixtures.Mixture([total] * len(columns), [1] * len(columns), 0)
  placed = 0

  def sizes(start, stop):
    nonlocal placed
    components, chosen = stream.documents(start, stop)
    out = np.empty((stop - start, 2), np.int64)
    for c, column in enumerate(columns):
      mine = components == c
      out[mine] = column.sizes(chosen[mine], counts)
    placed += int(out[:, 0].sum()) if start < limit else 0
    return out

  limit = total // 5 // _WINDOW * _WINDOW
  plan = packing.PackingPlan(sizes, limits=_LIMITS, window=_WINDOW)
  start, rows = time.process_time(), 0
  while plan.settled(rows + 1) <= limit:
    rows += 1
  seconds = time.process_time() - start
  return limit / seconds * 60 / 1e6, placed / rows / _LIMITS[0]


class _Captions:
  """Captions of COCO, each with an image, in both directions."""

  name, image_size, num_images = "captions", 4, 20_000

  def __init__(self):
    """Reads captions."""
    rows = [json.loads(line) for line in _PHOTOGRAPHS.open()]
    self._found = [text for row in rows for text in row["captions"]]
    self._blank = np.zeros((self.image_size, self.image_size, 3), np.uint8)

  def text(self, i):
    """Returns the caption of image i."""
    return self._found[i % len(self._found)]

  def image(self, i):
    """Returns a blank image."""
    return self._blank

  def image_key(self, i):
    """Returns the number as a name."""
    return str(i)

  def captions(self, i):
    """Returns the caption."""
    return [self.text(i)]

  def tasks(self):
    """Returns both directions."""
    return tuple(examples.OF_CAPTIONS)

  def num_examples(self, task):
    """Returns one for each image."""
    return self.num_images

  def example(self, task, i):
    """Returns example i."""
    return examples.OF_CAPTIONS[task](str(i), i, self.text(i))

  def contents(self):
    """Returns what lengths are kept for: nothing is, they are too few."""
    return self.name


class _Codes:
  """Codes of images, made of their numbers."""

  num_patches = 256

  def __init__(self, counts, folder):
    """Takes the number of codes of each image."""
    self.counts, self.directory = counts, folder
    self.meta = argparse.Namespace(num_codes=32)

  def __len__(self):
    return len(self.counts)

  def keep(self, i):
    """Returns which patches are kept."""
    return np.arange(self.num_patches) < self.counts[i]

  def codes(self, i):
    """Returns the codes."""
    return (i + np.arange(self.counts[i])) % 32


def _rows(rng):
  """Returns millions of tokens a second of rows that are made."""
  source = _Captions()
  counts = rng.integers(50, 141, source.num_images).astype(np.int32)
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    text = vocabulary.TextTokenizer.train(
      map(source.text, range(2000)), root / "tokenizer.model", 800
    )
    batches = pipeline.packed_rows(
      source,
      _Codes(counts, root),
      text,
      vocabulary.Vocabulary(text.size, 32),
      mixture=dict.fromkeys(source.tasks(), 1.0),
      length=_LIMITS[0],
      slots=_LIMITS[1],
      batch_size=8,
      window=_WINDOW,
    )
    _ = batches.rows[0]  # lengths, and the first window
    start, tokens = time.process_time(), 0
    for number in range(300):
      tokens += int((batches.rows[number]["segments"] > 0).sum())
    return tokens / (time.process_time() - start) / 1e6


if __name__ == "__main__":
  main()
