"""The dynamic visual tokenizer: selector, merger, 512 codes, decoder.

lavit train --config configs/tiny/tokenizer.py --workdir runs/tiny/tokenizer

The order of the phases matters: merger and decoder first learn to live with
any mask, then the selector learns what is worth keeping, then all together at
a low rate; only then k-means, and the codes with the selector frozen.
"""

from lavit_jax.configs.tiny import common


def get_config():
  """36 patches, about 12 kept, width 96, 512 codes of 32."""
  cfg = common.get_config("tokenizer")
  cfg.batch_size = 48
  cfg.data.capacity = 20  # tokens an image in the gathered form
  cfg.model = dict(
    tokenizer=dict(
      selector=dict(width=96),
      merger=dict(width=96, depth=2, num_heads=4, mlp_dim=384, unroll=2),
      quantizer=dict(width=96, num_codes=512, code_dim=32, decay=0.99),
      decoder=dict(
        width=96,
        depth=2,
        num_heads=4,
        mlp_dim=384,
        num_patches=36,
        code_dim=32,
        out_dim=96,
        unroll=2,
      ),
      merger_form="compact",
    ),
    compute=dict(  # of what is read from model_dir: see frozen/precision.py
      encoder=dict(dtype="float32", remat="none", unroll=4),
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
    rate=0.33,
    rate_weight=30.0,  # paper: 2, on a loss a fourth of this one
    entropy_weight=0.02,
  )
  cfg.schedule = ("random", "select", "joint", "codes")
  cfg.phases = dict(
    random=dict(
      steps=900,
      lr=1.5e-3,
      warmup=50,
      train=everything_but_selector,
      mask="random",
      keep_range=(0.15, 0.55),
    ),
    select=dict(
      steps=400, lr=2e-3, warmup=20, train={"selector": "base"}, **selecting
    ),
    joint=dict(
      steps=500, lr=6e-4, warmup=20, train={"all": "base"}, **selecting
    ),
    codes=dict(
      steps=600,
      lr=6e-4,
      warmup=20,
      train=everything_but_selector,
      mask="expected",
      quantize=True,
      commitment=0.25,
      revive_below=0.05,
      kmeans_iters=15,
      kmeans_batches=24,
    ),
  )
  for name in cfg.schedule:
    cfg.phases[name].detail_weight = 3.0
  return cfg
