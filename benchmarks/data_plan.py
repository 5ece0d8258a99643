"""How fast rows are planned from the lengths of documents.

  python benchmarks/data_plan.py [--documents 1000000] [--json]

Captions of 8 to 30 pieces with images of 50 to 140 visual tokens, read and
written, are packed into rows of 2048 positions and 16 images, in windows of
8192 documents, until a fifth of them is planned; and documents of 1 to 2048
positions, the hardest to pack. Times are of one core (CPU seconds).
"""

import argparse
import datetime
import json
import time

import numpy as np

from lavit_jax.data.batching import lengths, mixtures, packing

_LIMITS = 2048, 16
_WINDOW = 8192


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
    "date": datetime.date.today().isoformat(),
  }
  if args.json:
    print(json.dumps(found))
    return
  for name in ("captions", "any length"):
    rate, fill = found[name]
    print(f"{name:10s} {rate:6.1f} M documents a minute, fill {fill:.3f}")


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


if __name__ == "__main__":
  main()
