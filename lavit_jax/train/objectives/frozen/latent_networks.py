"""The frozen networks of stage `latents`: images to latents and conditions.

image -> encoder, tokenizer -> code vectors -> semantic decoder -> conditions
image -> autoencoder -> latents -> autoencoder -> image
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from lavit_jax.core import errors
from lavit_jax.diffusion import denoising
from lavit_jax.models.pixels import vae as vae_lib
from lavit_jax.models.tokenizer import tokenizer as tokenizer_lib
from lavit_jax.train import phases
from lavit_jax.train.objectives.frozen import (
  abstract_params,
  artifacts,
  branches,
  conditioning,
  latent_parts,
  precision,
)


class LatentNetworks:
  """Encoder, tokenizer, semantic decoder and autoencoder of a run.

  Attributes:
    tokenizer: the module, its config with the encoder's.
    conditioner: the semantic decoder and the projections, which may train.
    vae: the autoencoder's module.
    stored_vae: its config as stored, and as it is exported again.
    vae_branch: where its parameters are stored.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    stored: artifacts.Artifacts,
  ):
    """Reads the configs of the networks, no weights.

    Args:
      config: of the run.
      stored: where the networks are.

    Raises:
      errors.LavitError: a network is missing or does not fit the config.
    """
    self._config = config
    kind, model_dir = config.model.kind, config.model_dir
    tokenizer = stored.tokenizer_config(model_dir)
    conditioner = stored.conditioner(model_dir, kind, config.model.condition)
    folder = config.vae_from or config.start_from or model_dir
    self.stored_vae = stored.autoencoder(folder, kind)
    self.vae_branch = branches.Branch(folder, f"{kind}_pixels", "vae")
    # Projections compute in the dtype of the decoder.
    trains = phases.trains(config, "projection")
    computed = precision.applied(
      config,
      trained=("decoder",) if trains else (),
      encoder=tokenizer.vit,
      tokenizer=tokenizer,
      decoder=conditioner.model.config,
      vae=self.stored_vae,
    )
    self.tokenizer = tokenizer_lib.DynamicVisualTokenizer(
      dataclasses.replace(computed["tokenizer"], vit=computed["encoder"])
    )
    model = conditioner.model.clone(config=computed["decoder"])
    self.conditioner = dataclasses.replace(conditioner, model=model)
    self.vae = vae_lib.AutoencoderKL(computed["vae"])
    self._check()

  def _check(self) -> None:
    """Raises ConfigError unless config.data fits the networks."""
    data, side = self._config.data, self.tokenizer.config.vit.image_size
    if data.image_size != side:
      raise errors.ConfigError(
        f"data.image_size={data.image_size}, but the encoder of"
        f" {self._config.model_dir} takes {side} pixels a side. Set"
        f" data.image_size={side}."
      )
    latent_parts.check_buckets(data.buckets, self.vae.config)

  def shapes(self) -> dict[str, Any]:
    """Returns the parameters of the networks, abstract and boxed."""
    config, dtype = self.tokenizer.config, self._config.model.frozen_dtype
    tokenizer = abstract_params.tokenizer(config)
    conditioner = abstract_params.conditioner(self.conditioner.model, dtype)
    return {
      "encoder": abstract_params.encoder(config.vit, dtype),
      "tokenizer": latent_parts.without_decoder(tokenizer),
      "semantic": conditioner["decoder"],
      "vae": abstract_params.autoencoder(self.vae),
    }

  def branches(self) -> dict[str, Any]:
    """Returns where the networks are stored."""
    folder = self._config.model_dir
    return {
      "encoder": branches.Branch(folder, "encoder"),
      "tokenizer": branches.Branch(folder, "tokenizer"),
      "semantic": self.conditioner.semantic,
      "vae": self.vae_branch,
    }

  def init_projection(self, rng: jax.Array) -> Any:
    """Draws the boxed parameters of the projections."""
    model = self.conditioner.model
    shape = (1, model.config.num_patches)
    vectors = jnp.zeros((*shape, model.config.code_dim))
    params = dict(model.init(rng, vectors, jnp.ones(shape, bool))["params"])
    del params["decoder"]
    return params

  def latents(
    self,
    frozen: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """Encodes images as the U-Net sees them; no gradient passes.

    Args:
      frozen: parameters as of `shapes`.
      batch: with `target` uint8[B, H, W, 3], or `latents` out of a cache.
      keys: key[B] that latents are sampled with; None takes their means.

    Returns:
      float32[B, h, w, C].
    """
    factor = self.vae.config.scaling_factor
    if "latents" in batch:
      return batch["latents"].astype(jnp.float32) * factor
    apply: Any = self.vae.apply  # Linen types its result as a union
    mean, logvar = apply(
      {"params": frozen["vae"]},
      conditioning.to_unit(batch["target"]),
      method="encode",
    )
    noise = None if keys is None else denoising.normal(keys, mean.shape[1:])
    return jax.lax.stop_gradient(vae_lib.sample(mean, logvar, noise) * factor)

  def decode(self, frozen: Mapping[str, Any], z: jax.Array) -> jax.Array:
    """Decodes latents to images float32[B, H, W, 3] in [-1, 1]."""
    z = z / self.vae.config.scaling_factor
    image: Any = self.vae.apply({"params": frozen["vae"]}, z, method="decode")
    return jnp.clip(image, -1.0, 1.0)

  def conditions(
    self,
    projection: Any,
    frozen: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    gumbel: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """Computes what the U-Net is conditioned on.

    Args:
      projection: parameters of the projections; they get gradients.
      frozen: parameters as of `shapes`.
      batch: with `image` uint8[B, H, W, 3] and, for highres, `sizes`.
      gumbel: see `conditioning.visual_tokens`.

    Returns:
      `tokens` float[B, N, D]; highres: `pooled` float[B, P] and `sizes`
      float[B, 6] too.
    """
    ids, valid = conditioning.visual_tokens(
      self.tokenizer, frozen, batch["image"], gumbel
    )
    codes = frozen["tokenizer"]["codebook"]["codes"]
    out: Any = self.conditioner.model.apply(
      {"params": {"decoder": frozen["semantic"]} | projection},
      jnp.take(codes, ids, axis=0),
      valid,
    )
    if self._config.model.kind == "lowres":
      return {"tokens": out}
    tokens, pooled = out
    return {"tokens": tokens, "pooled": pooled, "sizes": batch["sizes"]}
