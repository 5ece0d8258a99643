"""Tokenizes a part of a data set in a process of its own, in small shards.

python -m tests.jobs.tokenize_part MODEL OUT I N SCENES
"""

import dataclasses
import functools
import sys

from lavit_jax.data.caches import codes
from lavit_jax.jobs import tokenize

SHARD, GROUP = 12, 4  # images of a shard, and of a device


def write(model, out, part, scenes, meta=codes.Meta):
  """Writes scenes; returns the summary."""
  tokenize._BATCH = GROUP
  tokenize.codes.Meta = functools.partial(meta, shard_size=SHARD)
  try:
    config = dict(
      kind="shapes", image_size=48, seed=0, train_size=scenes, held_out_size=8
    )
    return tokenize.write_cache(model, config, out, part=part, quiet=True)
  finally:
    tokenize._BATCH, tokenize.codes.Meta = 64, meta


if __name__ == "__main__":
  assert dataclasses.is_dataclass(codes.Meta)
  model, out, number, parts, scenes = sys.argv[1:]
  write(model, out, (int(number), int(parts)), int(scenes))
