r"""The dynamic visual tokenizer at full size: 16,384 words, EVA-CLIP frozen.

launch/tpu_pod.sh --name tokenizer --zone us-west4-a --type v5litepod-256 \
  --config configs/lavit_7b/tokenizer.py --workdir /mnt/shared/tokenizer -- \
  --config.model_dir=/mnt/shared/lavit_7b \
  --config.data.path=/mnt/shared/pictures.jsonl

On one machine: lavit train --config configs/lavit_7b/tokenizer.py --workdir DIR

Paper, section 3.1: 50K steps of 2048 images, lambda = 2, rho = 1/3, codes of
32 numbers; k-means, a codebook moved by running means, and the selector frozen
once codes are on (its authors' answers to users). The order of the phases, and
learning rates, are ours, from small runs: see configs/tiny/tokenizer.py.
`model_dir` has the part encoder: lavit port import of EVA-CLIP.
"""

import dataclasses

from lavit_jax.configs.lavit_7b import common

from lavit_jax.models.tokenizer import decoder, merger, quantizer


def get_config():
  """256 patches, about 85 kept, widths of EVA ViT-g."""
  cfg = common.get_config("tokenizer")
  cfg.batch_size = 2048
  cfg.mesh.fsdp = 16
  cfg.data.capacity = 192  # tokens an image in the gathered form
  cfg.model = dict(
    frozen_dtype="bfloat16",  # in which the encoder's weights are kept
    compute=dict(  # of what is read from model_dir: see frozen/precision.py
      encoder=dict(dtype="bfloat16", remat="none", unroll=1),
    ),
    tokenizer=dict(
      selector=dict(width=1408, dtype="bfloat16"),
      merger=dataclasses.asdict(merger.LAVIT_7B),
      quantizer=dataclasses.asdict(quantizer.LAVIT_7B),
      decoder=dataclasses.asdict(decoder.LAVIT_7B),
      merger_form="compact",
    ),
  )
  everything_but_selector = {
    "merger": "base",
    "quantizer": "base",
    "decoder": "base",
  }
  selecting = dict(
    mask="gumbel",
    temperature=0.5,
    rate=1 / 3,
    rate_weight=2.0,
    entropy_weight=0.02,
  )
  cfg.schedule = ("random", "select", "joint", "codes")
  cfg.phases = dict(
    random=dict(
      steps=16_000,
      lr=2e-4,
      warmup=1000,
      train=everything_but_selector,
      mask="random",
      keep_range=(0.15, 0.55),
    ),
    select=dict(
      steps=4_000, lr=2e-4, warmup=200, train={"selector": "base"}, **selecting
    ),
    joint=dict(
      steps=10_000, lr=1e-4, warmup=500, train={"all": "base"}, **selecting
    ),
    codes=dict(
      steps=20_000,
      lr=1e-4,
      warmup=500,
      train=everything_but_selector,
      mask="expected",
      quantize=True,
      commitment=0.25,
      revive_below=0.05,
      kmeans_iters=15,
      kmeans_batches=4,
    ),
  )
  for name in cfg.schedule:
    cfg.phases[name].detail_weight = 0.0  # the paper's loss alone
  return cfg
