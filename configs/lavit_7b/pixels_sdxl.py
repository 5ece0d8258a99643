r"""The highres pixel decoder: SDXL in six ratios, told by visual words.

lavit train --config configs/lavit_7b/pixels_sdxl.py --workdir runs/sdxl \
  --config.model_dir=models/lavit_7b --config.start_from=models/sdxl \
  --config.data.path=data/pictures.jsonl

Paper, section 3.2: 20K steps from the weights of Stable Diffusion with the loss
on eps; batch size and learning rate it does not tell. `model_dir` has the parts
encoder, tokenizer and highres (or a tokenizer that was trained here: then
projections and pooling start from nothing), `start_from` the part
highres_pixels, both by `lavit port import`. Lines {"image": "a.jpg"} are
enough, captions are not read. Both parts, highres and highres_pixels, are
written to `model_dir`, in place of any there: give a copy.

Weights, their mean and Adam's moments take 2567.5 M x 16 bytes = 41 GB, shared
by the devices of mesh.fsdp. A single device of 16 GB holds a LoRA:

  --config.model.lora.rank=16 --config.model.lora.alpha=16 \
  --config.phases.train.lr=1e-4 --config.batch_size=1 --config.mesh.fsdp=1

with the frozen U-Net in bfloat16 (5.1 GB), encoder (2.0 GB), tokenizer in
float32 (1.7 GB), semantic decoder (0.8 GB) and autoencoder in float32 (0.3 GB);
blocks of the U-Net are recomputed (remat), and what is left is for the maps of
one image. The autoencoder's are the largest, 0.5 GB each: `lavit latents`
with this config writes latents beforehand; then add
  --config.data.latents_dir=DIR --config.phases.train.sample_latents=False
"""

import dataclasses

from lavit_jax.configs.lavit_7b import common

from lavit_jax.diffusion import schedules
from lavit_jax.models.pixels import unet, vae
from lavit_jax.models.tokenizer import decoder


def get_config():
  """eps-prediction in six ratios with SDXL's numbers of size and place."""
  cfg = common.get_config("latents")
  cfg.batch_size = 256
  cfg.mesh.fsdp = 16
  # Convolutions in windows of this size compile in a third of the time; by the
  # compiler's own account they and the transformers take a tenth more cycles,
  # in a step that waits for its weights (benchmarks/unet_compile.py). Half the
  # size compiles in less again, at half as many cycles more.
  cfg.compiler_options = {"xla_tpu_scoped_vmem_limit_kib": "16384"}
  cfg.vae_from = ""  # a model directory with another autoencoder
  cfg.model = dict(
    kind="highres",
    frozen_dtype="bfloat16",  # kept so: all but tokenizer and autoencoder
    compute=dict(  # of what is read from model_dir: see frozen/precision.py
      encoder=dict(dtype="bfloat16", remat="none", unroll=1),
      # Codes are told apart by small differences.
      tokenizer=dict(dtype="float32", remat="none", unroll=1),
      decoder=dict(dtype="bfloat16", remat="none", unroll=1),
      vae=dict(dtype="float32"),
    ),
    uncond_tokens=0,  # zeros stand for no condition
    condition=dict(dims=(768, 1280), pooled=1280),
    unet=dataclasses.asdict(unet.SDXL_UNET) | {"remat": "dots"},
    lora=dict(rank=0, alpha=0.0),
    schedule=dataclasses.asdict(schedules.STABLE_DIFFUSION),
  )
  cfg.assumed.decoder = dataclasses.asdict(decoder.LAVIT_7B)
  cfg.assumed.vae = dataclasses.asdict(vae.SDXL_VAE)
  cfg.data.buckets = (  # heights and widths, see `infer.latents.RATIOS`
    (1024, 1024),
    (896, 1152),
    (832, 1216),
    (768, 1344),
    (1216, 832),
    (1152, 896),
  )
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
      train={"unet": "base", "projection": "base"},
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
