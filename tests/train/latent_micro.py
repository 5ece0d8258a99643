"""A micro model directory with every part that stage `latents` asks for."""

import dataclasses
import importlib
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core.storage import checkpoints
from lavit_jax.diffusion import schedules
from lavit_jax.models.encoder import vision
from lavit_jax.models.pixels import unet, vae
from lavit_jax.models.tokenizer import (
  decoder,
  merger,
  quantizer,
  selector,
  tokenizer,
)
from lavit_jax.train.objectives.frozen import latent_parts

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
  channels=(8, 8), layers_per_block=1, groups=4, sample_size=32
)
BUCKETS = ((24, 32), (32, 24))
SIZES = {
  "lowres": {"dims": (12,), "pooled": 0},
  "highres": {"dims": (8, 12), "pooled": 10},
}
UNCOND = 3
SCHEDULE = schedules.NoiseSchedule(  # of configs/tiny/latents.py
  spacing="trailing",
  steps_offset=0,
  alpha_to_one=True,
  prediction="velocity",
  zero_snr=True,
)


def unet_config(kind, **changes):
  """A U-Net of two levels for the conditions of `SIZES`."""
  sizes = SIZES[kind]
  pooled = sizes["pooled"]
  details = unet.DiffusersQuirks(
    mask_bias=unet.MASK_BIAS,
    added_dim=pooled + 6 * 8 if pooled else 0,
    added_time_dim=8 if pooled else 0,
  )
  return unet.UNetConfig(
    in_channels=4,
    out_channels=4,
    channels=(8, 16),
    layers_per_block=1,
    attention=(False, True),
    # Two that a scan can stack in SDXL's form alone: each is slow to compile.
    transformer_layers=(1, 2 if kind == "highres" else 1),
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
  cfg.model_dir = str(pathlib.Path(root) / "model")
  cfg.batch_size = 8
  cfg.model.kind = kind
  cfg.model.condition = SIZES[kind]
  cfg.model.uncond_tokens = UNCOND
  scan = kind == "highres"  # as in SDXL's config
  cfg.model.unet = dataclasses.asdict(unet_config(kind, scan=scan))
  cfg.data.image_size = 32
  cfg.data.train_size = cfg.data.held_out_size = 16
  cfg.data.buckets = BUCKETS
  cfg.data.threads = 0
  cfg.log.every = 2
  cfg.eval.every, cfg.eval.batches = 1000, 1
  cfg.eval.sample_pictures, cfg.eval.sample_steps = 2, 2
  cfg.checkpoint.every = 2
  cfg.phases.train.steps = 4
  for path, value in updates.items():
    node = cfg
    *parents, last = path.split("__")
    for parent in parents:
      node = node[parent]
    node[last] = value
  return cfg


def _init(init, seed, *args):
  """Random variables of an init function, drawn without compiling it."""
  rng = np.random.default_rng(seed)
  abstract = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), *args))

  def draw(path, leaf):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    if name in ("scale", "bias"):
      return np.full(leaf.shape, name == "scale", np.float32)
    fan = np.prod(leaf.shape[:-1]) or 1
    return rng.normal(0, fan**-0.5, leaf.shape).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, abstract)


def save_model(directory, kinds=("lowres", "highres"), *, unets=True):
  """Writes encoder, tokenizer without a decoder, and the parts of `kinds`."""
  config = TOKENIZER
  grid = config.num_patches
  encoder = _init(vision.EvaVit(config.vit).init, 0, jnp.zeros((1, 32, 32, 3)))
  meta = {"vit": dataclasses.asdict(config.vit)}
  checkpoints.save_part(directory, "encoder", encoder["params"], meta)
  model = tokenizer.DynamicVisualTokenizer(config)
  made = _init(model.init, 1, jnp.zeros((1, grid, 16)), jnp.ones((1, grid)))
  params = dict(made["params"])
  if kinds:  # as imported: the semantic decoders are parts of their own
    del params["decoder"]
  stored = {"params": params, "codebook": made["codebook"]}
  meta = {"tokenizer": dataclasses.asdict(config)}
  checkpoints.save_part(directory, "tokenizer", stored, meta)
  for kind in kinds:
    save_kind(directory, kind, unets)


def save_kind(directory, kind, unets=True, schedule=SCHEDULE):
  """Writes the parts `kind` and `kind`_pixels with random weights."""
  sizes, grid = SIZES[kind], TOKENIZER.num_patches
  if kind == "lowres":
    model = decoder.LowresDecoder(TOKENIZER.decoder, *sizes["dims"])
  else:
    model = decoder.HighresDecoder(
      TOKENIZER.decoder, sizes["dims"], sizes["pooled"]
    )
  made = _init(
    model.init, 2, jnp.zeros((1, grid, 8)), jnp.ones((1, grid), bool)
  )
  meta = latent_parts.conditioner_meta(kind, model)
  checkpoints.save_part(directory, kind, made["params"], meta)
  net = vae.AutoencoderKL(VAE)
  tree = {"vae": _init(net.init, 3, jnp.zeros((1, 8, 8, 3)))["params"]}
  meta = {
    "vae": dataclasses.asdict(VAE),
    "schedule": dataclasses.asdict(schedule),
  }
  if unets:
    net = unet.UNet(unet_config(kind))
    init = lambda key: latent_parts.init_unet(net, key)
    tree["unet"] = _init(init, 4)
    meta["unet"] = dataclasses.asdict(net.config)
    if kind == "lowres":
      shape = (1, UNCOND, sum(sizes["dims"]))
      tree["uncond"] = np.ones(shape, np.float32)
  checkpoints.save_part(directory, f"{kind}_pixels", tree, meta)
