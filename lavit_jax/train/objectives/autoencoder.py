"""Stage `autoencoder`: the latents in which a pixel decoder draws.

Only for training from nothing: official models bring Stable Diffusion's. The
absolute error of the image and a little of the KL divergence from a unit
Gaussian (Rombach et al., arXiv 2112.10752, section 3.1), without their
perceptual and adversarial terms.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lavit_jax.core import averages, errors
from lavit_jax.diffusion import denoising
from lavit_jax.models.pixels import vae
from lavit_jax.train.objectives import base, conditioning
from lavit_jax.train.objectives.frozen import precision

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
    precision.applied(config)  # it reads no network
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
    """Images alone."""
    return self.image_shapes()

  def draws(self, phase, batch, rng):
    """A key of the latents a row."""
    del phase
    return {"latents": jax.random.split(rng, len(batch["image"]))}

  def norms(self, phase, params, frozen, state, batch, draws):
    """Images."""
    del phase, params, frozen, state, draws
    return {"images": batch["valid"].sum()}

  def sums(self, phase, params, frozen, state, batch, draws):
    """Error and divergence of valid images; moments of their latents."""
    del phase, frozen, state
    x, variables = conditioning.to_unit(batch["image"]), {"params": params}
    valid = batch["valid"]
    mean, logvar = self.vae.apply(variables, x, method="encode")
    noise = denoising.normal(draws["latents"], mean.shape[1:])
    z = vae.sample(mean, logvar, noise)
    made = self.vae.apply(variables, z, method="decode")
    spread = jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar
    total = lambda x: (x.mean((1, 2, 3)) * valid).sum()
    images = valid.sum()
    seen = {
      "mean": total(mean),
      "square": total(jnp.square(mean)),
      "images": images,
    }
    sums = {
      "error": total(jnp.abs(made - x)),
      "kl": 0.5 * total(spread),
      "images": images,
    }
    return sums, jax.lax.stop_gradient(seen)

  def combine(self, phase, sums):
    """The error and a little of the divergence, means over images."""
    total = sums["error"] + phase["kl_weight"] * sums["kl"]
    count = sums["images"]
    metrics = {
      "loss": averages.mean(total, count),
      "kl": averages.mean(sums["kl"], count),
    }
    return averages.ratio(total, count), metrics

  def update_extra(self, phase, state, seen, params):
    """The running moments move towards those of the batch."""
    del phase, params
    count = seen["images"]
    move = lambda name: (
      state[name]
      + _FORGET * (seen[name] / jnp.maximum(count, 1.0) - state[name])
    )
    moved = {name: move(name) for name in state}
    return jax.tree.map(
      lambda new, old: jnp.where(count > 0, new, old), moved, state
    ), {}

  def held_out_metrics(self, params, frozen, state, batch):
    """Error of images made again from their latents' means."""
    del frozen, state
    x = conditioning.to_unit(batch["image"])
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
