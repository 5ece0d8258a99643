"""A pixel decoder of the official kind, small: tokens to 48 px in latents.

lavit train --config configs/tiny/autoencoder.py --workdir runs/tiny/autoencoder
lavit train --config configs/tiny/latents.py --workdir runs/tiny/latents

The stage of configs/lavit_7b/pixels_sd15.py at another size, from nothing: it
makes the parts `lowres` and `lowres_pixels`.
"""

from lavit_jax.configs.tiny import common


def get_config():
  """Three ratios, velocities; all but the U-Net and a projection is frozen."""
  cfg = common.get_config("latents")
  cfg.batch_size = 24
  cfg.start_from = ""  # a model directory whose U-Net it goes on from
  cfg.vae_from = ""  # one whose autoencoder it takes; "": model_dir
  cfg.model = dict(
    kind="lowres",
    frozen_dtype="float32",
    compute=dict(  # of what is read from model_dir: see frozen/precision.py
      encoder=dict(dtype="float32", remat="none", unroll=4),
      tokenizer=dict(dtype="float32", remat="none", unroll=2),
      decoder=dict(dtype="float32", remat="none", unroll=2),
      vae=dict(dtype="float32"),
    ),
    uncond_tokens=4,
    condition=dict(dims=(64,), pooled=0),
    unet=dict(
      in_channels=4,
      out_channels=4,
      channels=(48, 96),
      layers_per_block=1,
      attention=(True, True),
      transformer_layers=(1, 1),
      num_heads=(4, 4),
      cross_dim=64,
      groups=8,
      ff_mult=2,
    ),
    lora=dict(rank=0, alpha=0.0),
    schedule=dict(
      num_steps=1000,
      kind="scaled_linear",
      beta_start=0.00085,
      beta_end=0.012,
      spacing="trailing",
      steps_offset=0,
      alpha_to_one=True,
      prediction="velocity",
      zero_snr=True,
    ),
  )
  cfg.data.buckets = ((48, 48), (40, 56), (56, 40))
  cfg.data.crop = "center"
  cfg.data.latents_dir = ""  # see `lavit latents`
  cfg.data.held_out_latents_dir = ""
  cfg.eval.sample_pictures, cfg.eval.sample_steps = 24, 20
  cfg.schedule = ("train",)
  cfg.phases = dict(
    train=dict(
      steps=600,
      lr=2e-3,
      warmup=50,
      train={"all": "base"},
      selection="expected",
      sample_latents=False,
      condition_dropout=0.1,
      weighting="output",
      min_snr=5.0,
      draws=2,
      ema_decay=0.995,
    )
  )
  return cfg
