"""A small autoencoder from nothing, for configs/tiny/latents.py to draw in.

lavit train --config configs/tiny/autoencoder.py --workdir runs/tiny/autoencoder
"""

from lavit_jax.configs.tiny import common


def get_config():
  """4 x 4 pixels a place of 4 channels."""
  cfg = common.get_config("autoencoder")
  cfg.batch_size = 24
  cfg.model = dict(
    kind="lowres",  # of the part lowres_pixels, until latents completes it
    vae=dict(
      channels=(16, 32, 48),
      layers_per_block=1,
      latent_channels=4,
      groups=8,
      sample_size=48,
    ),
  )
  cfg.schedule = ("train",)
  cfg.phases = dict(
    train=dict(
      steps=600, lr=2e-3, warmup=50, train={"all": "base"}, kl_weight=1e-4
    )
  )
  return cfg
