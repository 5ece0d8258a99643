"""Stage `autoencoder`: the latents in which a pixel decoder draws.

Only for training from nothing: official models bring Stable Diffusion's. The
loss is the absolute error of the image plus a small weight on the KL divergence
from a unit Gaussian (Rombach et al., arXiv 2112.10752, section 3.1), without
their perceptual and adversarial terms.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from lavit_jax.core import averages, errors
from lavit_jax.diffusion import denoising
from lavit_jax.models.pixels import vae
from lavit_jax.train import phases
from lavit_jax.train.objectives import base
from lavit_jax.train.objectives.frozen import (
  abstract_params,
  conditioning,
  precision,
)
from lavit_jax.train.objectives.frozen import artifacts as artifacts_lib

_MOMENTUM = 0.05  # share of the newest batch in the latents' moments


class AutoencoderObjective(base.Objective):
  """Trains a `vae.AutoencoderKL` on square images.

  A phase has the setting `kl_weight`. The scaling factor is measured: latents
  times it have unit variance.
  """

  best_metric = "picture_mse"
  best_mode = "min"

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    artifacts: artifacts_lib.Artifacts | None = None,
  ):
    super().__init__(config, artifacts)
    precision.applied(config)  # the stage reads no network
    self.part = f"{config.model.kind}_pixels"
    self.vae: Any = vae.AutoencoderKL(
      vae.VaeConfig(**config.model.vae.to_dict())
    )
    if config.data.image_size % self.vae.config.scale:
      raise errors.ConfigError(
        f"data.image_size={config.data.image_size} is not a multiple of"
        f" {self.vae.config.scale}, the pixels of a latent position. Change it,"
        " or the levels of model.vae.channels."
      )
    self._train_data, self._held_out_data = self.artifacts.image_batches(
      config, (self.source, self.held_out)
    )

  def init(self, rng: jax.Array) -> tuple[base.Params, base.Extra]:
    """Draws the parameters; extra: mean and mean square of latents."""
    side = self.vae.config.scale
    params = self.vae.init(rng, jnp.zeros((1, side, side, 3)))["params"]
    return params, {"mean": jnp.zeros(()), "square": jnp.ones(())}

  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns images alone."""
    return abstract_params.image_batch(self.config)

  def draws(
    self, phase: phases.Phase, batch: base.Batch, rng: jax.Array
  ) -> base.Draws:
    """Draws a key for the latents of each row."""
    del phase
    return {"latents": jax.random.split(rng, len(batch["image"]))}

  def nonlinear_sums(
    self,
    phase: phases.Phase,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
    draws: base.Draws,
  ) -> base.Sums:
    """Counts valid images."""
    del phase, params, frozen, extra, draws
    return {"images": batch["valid"].sum()}

  def sums(
    self,
    phase: phases.Phase,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
    draws: base.Draws,
  ) -> tuple[base.Sums, base.Stats]:
    """Sums error and divergence of valid images; stats: latents' moments."""
    del phase, frozen, extra
    x, variables = conditioning.to_unit(batch["image"]), {"params": params}
    valid = batch["valid"]
    mean, logvar = self.vae.apply(variables, x, method="encode")
    noise = denoising.normal(draws["latents"], mean.shape[1:])
    z = vae.sample(mean, logvar, noise)
    decoded = self.vae.apply(variables, z, method="decode")
    divergence = jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar
    total = lambda x: (x.mean((1, 2, 3)) * valid).sum()
    images = valid.sum()
    stats = {
      "mean": total(mean),
      "square": total(jnp.square(mean)),
      "images": images,
    }
    sums = {
      "error": total(jnp.abs(decoded - x)),
      "kl": 0.5 * total(divergence),
      "images": images,
    }
    return sums, jax.lax.stop_gradient(stats)

  def combine(
    self, phase: phases.Phase, sums: base.Sums
  ) -> tuple[jax.Array, averages.Metrics]:
    """Takes the mean error over images plus the weighted divergence."""
    total = sums["error"] + phase["kl_weight"] * sums["kl"]
    count = sums["images"]
    metrics: averages.Metrics = {
      "loss": averages.mean(total, count),
      "kl": averages.mean(sums["kl"], count),
    }
    return averages.ratio(total, count), metrics

  def update_extra(
    self,
    phase: phases.Phase,
    extra: base.Extra,
    stats: base.Stats,
    params: base.Params,
  ) -> tuple[base.Extra, averages.Metrics]:
    """Moves the latents' running moments towards those of the batch."""
    del phase, params
    count = stats["images"]
    move = lambda name: (
      extra[name]
      + _MOMENTUM * (stats[name] / jnp.maximum(count, 1.0) - extra[name])
    )
    moved = {name: move(name) for name in extra}
    return jax.tree.map(
      lambda new, old: jnp.where(count > 0, new, old), moved, extra
    ), {}

  def held_out_metrics(
    self,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
  ) -> dict[str, Any]:
    """Measures the error of images decoded from the means of their latents."""
    del frozen, extra
    x = conditioning.to_unit(batch["image"])
    decoded = self.vae.apply({"params": params}, x)
    square = jnp.square(decoded - x).mean((1, 2, 3))
    error = jnp.abs(decoded - x).mean((1, 2, 3))
    return {
      "loss": denoising.mean(error, batch["valid"]),
      "picture_mse": denoising.mean(square, batch["valid"]),
    }

  def export(
    self, params: base.Params, extra: base.Extra
  ) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Returns the autoencoder alone; stage `latents` adds a U-Net."""
    std = float(jnp.sqrt(extra["square"] - jnp.square(extra["mean"])))
    config = dataclasses.replace(
      self.vae.config, scaling_factor=1.0 / max(std, 1e-3)
    )
    meta = {"vae": dataclasses.asdict(config)}
    return {self.part: ({"vae": params}, meta)}
