#!/usr/bin/env bash
# JAX 0.10.2: Pallas' splash attention over all positions cannot
# be split over the queries.
#
# make_splash_mha() takes `q_seq_shards`, so that the kernel can be used inside
# shard_map with the sequence split. With CausalMask it works; with FullMask,
# in which no block is partly masked, it raises "ValueError: need at least one
# array to concatenate": `mask_next` is None for each shard, and its padding
# (_process_mask, "Shrink the width of the mask info") is concatenated without
# asking. A way round: a kernel of one shard's lengths and q_seq_shards=1, its
# masks replicated, for they are the same for each. Exit status 1 once this has
# changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import sys

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash


def makes(mask, shards):
  try:
    splash.make_splash_mha(
      splash.MultiHeadMask([mask]),
      block_sizes=splash.BlockSizes(block_q=128, block_kv=256),
      head_shards=1,
      q_seq_shards=shards,
    )
  except ValueError as error:
    print(f"  ValueError: {error}")
    return False
  return True


seen = [
  (type(mask).__name__, shards, makes(mask, shards))
  for mask in (splash.CausalMask((512, 512)), splash.FullMask((512, 512)))
  for shards in (1, 2)
]
print(f"jax {jax.__version__}: (mask, query shards, a kernel is made): {seen}")
expected = [
  ("CausalMask", 1, True),
  ("CausalMask", 2, True),
  ("FullMask", 1, True),
  ("FullMask", 2, False),
]
sys.exit(seen != expected)
PYTHON
