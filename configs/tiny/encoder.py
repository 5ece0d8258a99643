"""A small vision encoder from nothing: contrast, captions, masked patches.

lavit train --config configs/tiny/encoder.py --workdir runs/tiny/encoder
"""

from lavit_jax.configs.tiny import common


def get_config():
  """48 px, 36 patches, width 96."""
  cfg = common.get_config("encoder")
  cfg.batch_size = 96
  cfg.model = dict(
    vit=dict(
      image_size=48,
      patch_size=8,
      width=96,
      depth=4,
      num_heads=4,
      mlp_dim=384,
      mask_token=True,
      position_std=0.5,
      unroll=4,  # layers in one piece: faster on CPU, longer to compile
    ),
    text=dict(
      width=96, depth=1, num_heads=4, num_kv_heads=4, mlp_dim=256, max_len=64
    ),
    captioner=dict(
      width=96,
      depth=2,
      num_heads=4,
      num_kv_heads=4,
      mlp_dim=256,
      max_len=96,
      unroll=2,
    ),
    embed_dim=64,
  )
  cfg.schedule = ("train",)
  cfg.phases = dict(
    train=dict(
      steps=700,
      lr=2e-3,
      warmup=50,
      train={"all": "base"},
      mask_share=0.3,
      contrast_weight=1.0,
      caption_weight=1.0,
      pixel_weight=10.0,
      whitening_weight=0.03,
    )
  )
  return cfg
