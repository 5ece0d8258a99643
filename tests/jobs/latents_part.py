"""Encodes images in one of several joined processes, in small shards.

python -m tests.jobs.latents_part ROOT OUT
"""

import sys
from unittest import mock

from lavit_jax.commands import caches
from lavit_jax.data.caches import latents
from lavit_jax.jobs import latents as latents_job

SHARD, GROUP = 3, 2  # images of a shard, and of a device


def write(root, out, part=(0, 1), **fields):
  """Encodes the images of a folder; returns the summary."""
  data = {
    "kind": "jsonl",
    "path": f"{root}/images/my.jsonl",
    "held_out_path": f"{root}/images/my.jsonl",  # or a tenth would be
    "image_size": 32,
    "buckets": ((24, 32), (32, 24)),
  }
  with mock.patch.object(latents, "_SHARD_SIZE", SHARD):
    return latents_job.write_cache(
      f"{root}/model",
      "lowres",
      data | fields,
      out,
      batch=GROUP,
      part=part,
      quiet=True,
    )


if __name__ == "__main__":
  write(*sys.argv[1:], **caches.shared_by(None))
