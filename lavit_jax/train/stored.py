"""Where a stage finds its data and the weights of earlier stages.

`Stored` reads them. `Outline` knows their shapes alone, from `config.assumed`,
so that a run can be compiled where neither weights nor data are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lavit_jax import checkpoints, errors
from lavit_jax.data import sources
from lavit_jax.models import decoder, tokenizer, unet, vae
from lavit_jax.train import latent_parts, shapes
from lavit_jax.train import state as state_lib


class Stored:
  """Model directories and datasets on disk."""

  outline = False
  part = staticmethod(checkpoints.load_part)
  words = staticmethod(latent_parts.load_words)
  conditioner = staticmethod(latent_parts.load_conditioner)
  autoencoder = staticmethod(latent_parts.load_vae)
  branch = staticmethod(latent_parts.read_tree)
  cast = staticmethod(latent_parts.cast)
  check_start = staticmethod(latent_parts.check_start)

  def sources(self, config):
    """The (train, held-out) sources of config.data."""
    return sources.pair(config.data.to_dict())


class Outline:
  """The same, by shape: arrays are `jax.ShapeDtypeStruct`, sources None.

  `config.assumed` says what is not in the rest of a config: `tokenizer`, a
  `tokenizer.TokenizerConfig` as a dict with its encoder; `text_size`, pieces
  of text in the vocabulary; `capacity`, the most words of a picture.
  """

  outline = True

  def __init__(self, config):
    if "assumed" not in config:
      raise errors.ConfigError(
        f"{config.model_dir} lacks parts that stage {config.stage!r} reads,"
        " and the config has no `assumed` that tells their sizes. Train the"
        " stages before, give another --config.model_dir, or add"
        " config.assumed as configs/lavit_7b/common.py does."
      )
    self.assumed = config.assumed
    self.tokenizer = tokenizer.config_from_dict(
      config.assumed.tokenizer.to_dict()
    )

  def sources(self, config):
    """None, None."""
    del config
    return None, None

  def part(self, directory, name, *, dtype="float32"):
    """The parts `encoder` and `tokenizer`."""
    del directory
    config = self.tokenizer
    if name == "encoder":
      made = shapes.encoder(config.vit, dtype)
      meta = {"vit": dataclasses.asdict(config.vit)}
    elif name == "tokenizer":
      made = shapes.words(config)
      meta = {"tokenizer": dataclasses.asdict(config)}
    else:
      raise ValueError(f"{name!r} is no part that an outline knows.")
    return checkpoints.Part(state_lib.unbox(made), meta)

  def words(self, directory, dtype) -> latent_parts.Words:
    """Encoder and tokenizer of a pixel decoder."""
    del directory
    model = latent_parts.words_model(self.tokenizer, dtype)
    made = state_lib.unbox(shapes.words(model.config))
    frozen = {
      "encoder": state_lib.unbox(shapes.encoder(model.config.vit, dtype)),
      "tokenizer": latent_parts.used_words(made),
    }
    return latent_parts.Words(model, frozen)

  def conditioner(self, directory, kind, sizes, dtype):
    """The semantic decoder of one kind, projections as imported."""
    del directory
    config = dataclasses.replace(decoder.LAVIT_7B, dtype=dtype)
    model = latent_parts.make_conditioner(kind, config, sizes)
    made = dict(state_lib.unbox(shapes.conditioner(model)))
    semantic = made.pop("decoder")
    return latent_parts.Conditioner(model, semantic, made, {})

  def autoencoder(self, directory, kind):
    """The autoencoder of one kind."""
    del directory
    model = vae.AutoencoderKL(
      vae.SD15_VAE if kind == "lowres" else vae.SDXL_VAE
    )
    return model, state_lib.unbox(shapes.autoencoder(model))

  def branch(self, directory, name, top, dtype="float32"):
    """The U-Net that a LoRA changes, its layers apart as in files."""
    del directory
    if top != "unet":
      raise ValueError(f"{top!r} is no branch that an outline knows.")
    config = unet.SD15_UNET if name == "lowres_pixels" else unet.SDXL_UNET
    apart = dataclasses.replace(config, scan=False)
    return state_lib.unbox(shapes.denoiser(unet.UNet(apart), dtype))

  def cast(self, tree: Any, dtype):
    """A tree of shapes, its floats in a dtype."""
    dtype = jnp.dtype(dtype)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, checkpoints.cast_dtype(x.dtype, dtype)
      ),
      tree,
    )

  def check_start(self, run, config, schedule):
    """Nothing to check."""
    del run, config, schedule
