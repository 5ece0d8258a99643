"""Stage `autoencoder`: the latents in which a pixel decoder draws.

Only for training from nothing: official models bring Stable Diffusion's. The
absolute error of the picture and a little of the KL divergence from a unit
Gaussian (Rombach et al., arXiv 2112.10752, section 3.1), without their
perceptual and adversarial terms.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lavit_jax import errors
from lavit_jax.models import vae
from lavit_jax.train import conditions, denoising
from lavit_jax.train.objectives import base

_FORGET = 0.05  # of the running moments of the latents


class AutoencoderObjective(base.Objective):
  """Trains a `vae.AutoencoderKL` on squares.

  A phase has `kl_weight` beside what every phase has. The scaling factor is
  measured: latents times it have unit variance.
  """

  best_metric = "picture_mse"
  best_mode = "min"

  def __init__(self, config, where=None):
    super().__init__(config, where)
    self.part = f"{config.model.kind}_pixels"
    self.vae = vae.AutoencoderKL(vae.VaeConfig(**config.model.vae.to_dict()))
    if config.data.image_size % self.vae.config.scale:
      raise errors.ConfigError(
        f"data.image_size={config.data.image_size} is not a multiple of"
        f" {self.vae.config.scale}, the pixels of a latent place. Change it, or"
        " the levels of model.vae.channels."
      )
    self.use_images()

  def init(self, rng):
    """Boxed parameters; extra: running mean and mean square of latents."""
    side = self.vae.config.scale
    params = self.vae.init(rng, jnp.zeros((1, side, side, 3)))["params"]
    return params, {"mean": jnp.zeros(()), "square": jnp.ones(())}

  def batch_shapes(self):
    """Pictures alone."""
    return self.image_shapes()

  def loss(self, phase, params, frozen, state, batch, rng):
    """Weighted mean over valid pictures."""
    del frozen
    x, variables = conditions.to_unit(batch["image"]), {"params": params}
    mean, logvar = self.vae.apply(variables, x, method="encode")
    z = vae.sample(mean, logvar, rng)
    made = self.vae.apply(variables, z, method="decode")
    error = jnp.abs(made - x).mean((1, 2, 3))
    spread = jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar
    kl = 0.5 * spread.mean((1, 2, 3))
    loss = denoising.mean(error + phase["kl_weight"] * kl, batch["valid"])
    moments = {"mean": mean.mean(), "square": jnp.square(mean).mean()}
    moments = jax.lax.stop_gradient(moments)
    state = {k: v + _FORGET * (moments[k] - v) for k, v in state.items()}
    return loss, (state, {"kl": denoising.mean(kl, batch["valid"])})

  def held_out_metrics(self, params, frozen, state, batch):
    """Error of pictures made again from their latents' means."""
    del frozen, state
    x = conditions.to_unit(batch["image"])
    made = self.vae.apply({"params": params}, x)
    square = jnp.square(made - x).mean((1, 2, 3))
    error = jnp.abs(made - x).mean((1, 2, 3))
    return {
      "loss": denoising.mean(error, batch["valid"]),
      "picture_mse": denoising.mean(square, batch["valid"]),
    }

  def export(self, params, state):
    """The autoencoder alone: a U-Net joins it in stage `latents`."""
    spread = float(jnp.sqrt(state["square"] - jnp.square(state["mean"])))
    config = dataclasses.replace(
      self.vae.config, scaling_factor=1.0 / max(spread, 1e-3)
    )
    return {"vae": params}, {"vae": dataclasses.asdict(config)}
