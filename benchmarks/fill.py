"""How full rows are with the visual tokens that real photographs keep.

  python benchmarks/fill.py PHOTOGRAPHS.jsonl [MORE.jsonl] [--model tiny]

Every photograph is tokenized by the model's selector (`lavit tokenize`), which
keeps as many patches as it finds informative; each caption is learnt in both
directions. One epoch is packed, and of all rows it is checked that every
document is in exactly one of them and every image whole. Two sizes of rows are
filled: with the tokens as they are, and with the same shares of 256 patches, as
the 7B model has them.
"""

import argparse
import collections
import dataclasses
import fractions
import pathlib
import tempfile

import numpy as np

from lavit_jax.core import vocabulary
from lavit_jax.data.batching import packing, rows
from lavit_jax.data.caches import codes
from lavit_jax.data.sources import kinds
from lavit_jax.infer.loading import parts
from lavit_jax.jobs import tokenize

_MIXTURE = ("image_text", "text_image")
_WINDOW = 1024


@dataclasses.dataclass
class _Scaled:
  """A cache of as many patches as another model has, with the same shares."""

  directory: pathlib.Path
  meta: codes.Meta
  counts: np.ndarray

  def __len__(self):
    return len(self.counts)

  @property
  def num_patches(self):
    return self.meta.num_patches

  def keep(self, i):
    return np.arange(self.num_patches) < self.counts[i]

  def codes(self, i):
    return np.full(self.counts[i], i % self.meta.num_codes, np.int32)


def main() -> None:
  """Prints the fill of one epoch in each size."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("data", nargs="+")
  parser.add_argument("--model", default="tiny")
  args = parser.parse_args()
  directory = parts.resolve(args.model)
  tokenizer = parts.text_tokenizer(directory)
  with tempfile.TemporaryDirectory() as folder:
    sources, caches = [], []
    for k, path in enumerate(args.data):
      out = pathlib.Path(folder, str(k))
      config = dict(
        kind="jsonl", path=path, held_out_path=path, image_size=48, seed=0
      )
      tokenize.write_cache(directory, config, out)
      sources.append(kinds.build(config, "train"))
      caches.append(codes.CodeCache.load(out))
    kept = np.concatenate([cache.counts for cache in caches])
    patches = caches[0].num_patches
    low, high = np.quantile(kept, (0.05, 0.95))
    print(
      f"{len(kept)} photographs keep {kept.mean():.1f} of {patches} patches"
      f" ({low:.0f} to {high:.0f})"
    )
    words = vocabulary.Vocabulary(tokenizer.size, caches[0].meta.num_codes)
    wide = [_scaled(cache, 256) for cache in caches]
    for name, some, length, slots in (
      (f"{patches} patches, rows of 512", caches, 512, 32),
      ("256 patches, rows of 2048", wide, 2048, 16),
    ):
      _fill(name, sources, some, tokenizer, words, length, slots)


def _scaled(cache, patches):
  share = cache.counts / cache.num_patches
  counts = np.maximum(1, np.round(share * patches)).astype(np.int32)
  meta = dataclasses.replace(cache.meta, num_patches=patches)
  return _Scaled(cache.directory, meta, counts)


def _fill(name, sources, caches, tokenizer, words, length, slots) -> None:
  """Packs one epoch of every part, and prints how full its rows are."""
  components = [
    packing.Component(source, task, 1, caches[k], f"s{k}")
    for k, source in enumerate(sources)
    for task in _MIXTURE
  ]
  counts = [c.source.num_examples(c.task) for c in components]
  documents = rows.Documents(
    components,
    tokenizer,
    words,
    limits=(length, slots),
    seed=0,
    limit_share=1.0,
    window=_WINDOW,
    weights={0: [fractions.Fraction(count) for count in counts]},
  )
  plan = packing.PackingPlan(
    documents.sizes, limits=(length, slots), seed=0, window=_WINDOW
  )
  total = sum(counts)
  seen: collections.Counter = collections.Counter()
  used = number = 0
  while len(seen) < total:
    members = plan.row(number)
    for g in members:
      assert not isinstance(g, tuple), "an image or a caption was cut"
      if g < total:
        seen[g] += 1
    sizes = [documents.sizes(g, g + 1)[0] for g in members]
    used += int(np.sum([size[0] for size in sizes]))
    number += 1
  assert set(seen.values()) == {1}, "each document is in one row"
  at, chosen = documents.stream.documents(0, total)
  for c, count in enumerate(counts):
    once = np.bincount(chosen[at == c], minlength=count)
    assert abs(int((at == c).sum()) - count) <= 1
    assert (once > 1).sum() <= 1, "an epoch is over before another begins"
  print(
    f"{name}: {used / number / length:.2%} full, {number} rows of {total}"
    " documents, each in one row, none cut"
  )


if __name__ == "__main__":
  main()
