r"""The lowres pixel decoder: Stable Diffusion 1.5, told by visual words.

lavit train --config configs/lavit_7b/pixels_sd15.py --workdir runs/sd15 \
  --config.model_dir=models/lavit_7b --config.start_from=models/sd15 \
  --config.data.path=data/pictures.jsonl

Paper, section 3.2: 20K steps at 512 x 512 from the weights of Stable Diffusion
with the loss on eps; batch size and learning rate it does not tell.
`model_dir` has the parts encoder, tokenizer and lowres (or a tokenizer that was
trained here: then the projection starts from nothing), `start_from` the part
lowres_pixels, both by `lavit port import`. Lines {"image": "a.jpg"} are enough,
captions are not read. Both parts, lowres and lowres_pixels, are written to
`model_dir`, in place of any there: give a copy.

Weights, their mean and Adam's moments take 859.5 M x 16 bytes = 13.8 GB, shared
by the devices of mesh.fsdp. On a single device of 16 GB train a LoRA, 3 M
numbers at rank 16, on a frozen U-Net in bfloat16:

  --config.model.lora.rank=16 --config.model.lora.alpha=16 \
  --config.phases.train.lr=1e-4 --config.batch_size=4 --config.mesh.fsdp=1

`lavit latents` with this config writes latents beforehand; then add
  --config.data.latents_dir=DIR --config.phases.train.sample_latents=False
"""

import dataclasses

from lavit_jax.configs.lavit_7b import common

from lavit_jax.diffusion import schedules
from lavit_jax.models.pixels import unet, vae
from lavit_jax.models.tokenizer import decoder


def get_config():
  """eps-prediction at 512 x 512; encoder, tokenizer, decoder, VAE frozen."""
  cfg = common.get_config("latents")
  cfg.batch_size = 256
  cfg.mesh.fsdp = 8
  # All its blocks differ in shape, and none is under a scan: by default (16384)
  # their convolutions did not compile in 13 minutes, in windows of this size
  # they do in five (benchmarks/unet_compile.py has what it costs).
  cfg.compiler_options = {"xla_tpu_scoped_vmem_limit_kib": "8192"}
  cfg.vae_from = ""  # a model directory with another autoencoder
  cfg.model = dict(
    kind="lowres",
    frozen_dtype="bfloat16",  # kept so: all but tokenizer and autoencoder
    compute=dict(  # of what is read from model_dir: see frozen/precision.py
      encoder=dict(dtype="bfloat16", remat="none", unroll=1),
      # Codes are told apart by small differences.
      tokenizer=dict(dtype="float32", remat="none", unroll=1),
      decoder=dict(dtype="bfloat16", remat="none", unroll=1),
      vae=dict(dtype="float32"),
    ),
    uncond_tokens=77,  # as the official ones; if start_from has none
    condition=dict(dims=(768,), pooled=0),
    unet=dataclasses.asdict(unet.SD15_UNET),
    lora=dict(rank=0, alpha=0.0),
    schedule=dataclasses.asdict(schedules.STABLE_DIFFUSION),
  )
  cfg.assumed.decoder = dataclasses.asdict(decoder.LAVIT_7B)
  cfg.assumed.vae = dataclasses.asdict(vae.SD15_VAE)
  cfg.data.buckets = ((512, 512),)
  cfg.data.crop = "center"  # or "random"
  cfg.data.latents_dir = ""  # see `lavit latents`
  cfg.data.held_out_latents_dir = ""
  cfg.eval.sample_pictures, cfg.eval.sample_steps = 8, 25
  cfg.schedule = ("train",)
  cfg.phases = dict(
    train=dict(
      steps=20_000,
      lr=1e-5,
      warmup=500,
      train={"unet": "base", "projection": "base", "uncond": "base"},
      selection="expected",  # or "sampled", as official inference does
      sample_latents=True,
      condition_dropout=0.1,
      weighting="none",  # or "min_snr"
      min_snr=5.0,
      draws=1,
      ema_decay=0.9999,
    )
  )
  return cfg
