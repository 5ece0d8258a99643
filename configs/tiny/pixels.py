"""The pixel decoder: tokens to 48 px images.

lavit train --config configs/tiny/pixels.py --workdir runs/tiny/pixels
"""

from lavit_jax.configs.tiny import common


def get_config():
  """Pixel-space U-Net on 4 x 4 pixel places, cosine schedule.

  The network's output stands for the clean image, from which eps follows;
  the loss is the paper's, on eps, weighted so that noisy steps count, where
  the condition alone says what to draw.
  """
  cfg = common.get_config("pixels")
  cfg.batch_size = 24
  cfg.model = dict(
    pixels=dict(
      image_size=48,
      patch=4,
      num_patches=36,
      feature_dim=96,
      grid_channels=48,
      unet=dict(
        in_channels=96,
        out_channels=48,
        channels=(64, 80),
        layers_per_block=1,
        attention=(False, True),
        transformer_layers=(1, 1),
        num_heads=(4, 4),
        cross_dim=64,
        groups=8,
        ff_mult=2,
      ),
    ),
    schedule=dict(
      num_steps=1000,
      kind="cosine",
      spacing="trailing",
      steps_offset=0,
      alpha_to_one=True,
      clip=1.0,
      prediction="sample",
    ),
    compute=dict(  # of what is read from model_dir: see frozen/precision.py
      encoder=dict(dtype="float32", remat="none", unroll=4),
      tokenizer=dict(dtype="float32", remat="none", unroll=2),
    ),
  )
  cfg.schedule = ("train",)
  cfg.phases = dict(
    train=dict(
      steps=400,
      lr=2e-3,
      warmup=50,
      train={"all": "base"},
      condition_dropout=0.1,
      weighting="picture",
      min_snr=5.0,
      draws=2,
      ema_decay=0.995,
    )
  )
  return cfg
