"""A micro model directory with every part that stage `latents` asks for."""

import dataclasses
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax import checkpoints
from lavit_jax.infer import schedules
from lavit_jax.models import (
  decoder,
  merger,
  quantizer,
  selector,
  tokenizer,
  unet,
  vae,
  vision,
)
from lavit_jax.train import latent_parts

# Quick to compile; these programs are too small for optimizing to pay.
QUICK = {"xla_backend_optimization_level": 0}
TOKENIZER = tokenizer.TokenizerConfig(
  vit=vision.ViTConfig(
    image_size=32, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=16
  ),
  selector=selector.SelectorConfig(width=16),
  merger=dataclasses.replace(
    merger.TINY, width=16, depth=1, num_heads=2, mlp_dim=16
  ),
  quantizer=dataclasses.replace(
    quantizer.TINY, width=16, num_codes=32, code_dim=8
  ),
  decoder=dataclasses.replace(
    decoder.TINY,
    width=16,
    depth=1,
    num_heads=2,
    mlp_dim=16,
    num_patches=16,
    code_dim=8,
    out_dim=16,
  ),
)
VAE = vae.VaeConfig(
  channels=(8, 8, 8), layers_per_block=1, groups=4, sample_size=32
)
BUCKETS = ((32, 32), (24, 32), (32, 24))
SIZES = {
  "lowres": {"dims": (12,), "pooled": 0},
  "highres": {"dims": (8, 12), "pooled": 10},
}
UNCOND = 3


def unet_config(kind, **changes):
  """A U-Net of two levels for the conditions of `SIZES`."""
  sizes = SIZES[kind]
  pooled = sizes["pooled"]
  details = unet.Details(
    mask_bias=unet.MASK_BIAS,
    added_dim=pooled + 6 * 8 if pooled else 0,
    added_time_dim=8 if pooled else 0,
  )
  return unet.UNetConfig(
    in_channels=4,
    out_channels=4,
    channels=(8, 16),
    layers_per_block=1,
    attention=(True, True),
    transformer_layers=(1, 1),
    num_heads=(2, 2),
    cross_dim=sum(sizes["dims"]),
    groups=4,
    ff_mult=1,
    details=details,
    **changes,
  )


def config(kind, root, **updates):
  """configs/tiny/latents.py made micro; `updates` are dotted fields."""
  module = importlib.import_module("lavit_jax.configs.tiny.latents")
  cfg = module.get_config()
  cfg.model_dir = str(root / "model")
  cfg.batch_size = 8
  cfg.model.kind = kind
  cfg.model.condition = SIZES[kind]
  cfg.model.uncond_tokens = UNCOND
  cfg.model.unet = dataclasses.asdict(unet_config(kind))
  cfg.data.image_size = 32
  cfg.data.train_size = cfg.data.held_out_size = 16
  cfg.data.buckets = BUCKETS
  cfg.data.threads = 0
  cfg.log.every = 2
  cfg.eval.every, cfg.eval.batches, cfg.eval.sample_steps = 1000, 1, 2
  cfg.checkpoint.every = 2
  cfg.phases.train.steps = 4
  for path, value in updates.items():
    node = cfg
    *parents, last = path.split("__")
    for parent in parents:
      node = node[parent]
    node[last] = value
  return cfg


def _init(module, seed, *args):
  init = jax.jit(module.init, compiler_options=QUICK)
  return nn.meta.unbox(init(jax.random.key(seed), *args))


def save_model(directory, kinds=("lowres", "highres"), *, unets=True):
  """Writes encoder, tokenizer without a decoder, and the parts of `kinds`."""
  config = TOKENIZER
  grid = config.num_patches
  encoder = _init(vision.EvaVit(config.vit), 0, jnp.zeros((1, 32, 32, 3)))
  meta = {"vit": dataclasses.asdict(config.vit)}
  checkpoints.save_part(directory, "encoder", encoder["params"], meta)
  model = tokenizer.DynamicVisualTokenizer(config)
  made = _init(model, 1, jnp.zeros((1, grid, 16)), jnp.ones((1, grid)))
  params = dict(made["params"])
  if kinds:  # as imported: the semantic decoders are parts of their own
    del params["decoder"]
  stored = {"params": params, "codebook": made["codebook"]}
  meta = {"tokenizer": dataclasses.asdict(config)}
  checkpoints.save_part(directory, "tokenizer", stored, meta)
  for kind in kinds:
    save_kind(directory, kind, unets)


def save_kind(directory, kind, unets=True):
  """Writes the parts `kind` and `kind`_pixels with random weights."""
  sizes, grid = SIZES[kind], TOKENIZER.num_patches
  if kind == "lowres":
    told = decoder.LowresDecoder(TOKENIZER.decoder, *sizes["dims"])
  else:
    told = decoder.HighresDecoder(
      TOKENIZER.decoder, sizes["dims"], sizes["pooled"]
    )
  made = _init(told, 2, jnp.zeros((1, grid, 8)), jnp.ones((1, grid), bool))
  meta = latent_parts.conditioner_meta(kind, told)
  checkpoints.save_part(directory, kind, made["params"], meta)
  net = vae.AutoencoderKL(VAE)
  tree = {"vae": _init(net, 3, jnp.zeros((1, 8, 8, 3)))["params"]}
  meta = {
    "vae": dataclasses.asdict(VAE),
    "schedule": dataclasses.asdict(schedules.STABLE_DIFFUSION),
  }
  if unets:
    net = unet.UNet(unet_config(kind))
    init = jax.jit(
      lambda key: latent_parts.init_unet(net, key), compiler_options=QUICK
    )
    tree["unet"] = nn.meta.unbox(init(jax.random.key(4)))
    meta["unet"] = dataclasses.asdict(net.config)
    if kind == "lowres":
      shape = (1, UNCOND, sum(sizes["dims"]))
      tree["uncond"] = jax.random.normal(jax.random.key(5), shape)
  checkpoints.save_part(directory, f"{kind}_pixels", tree, meta)
