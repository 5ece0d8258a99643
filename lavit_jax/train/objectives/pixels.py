"""Stage `pixels`: a U-Net learns to redraw images from their tokens.

Paper section 3.2: || eps - eps_theta(z_t, t, x_rec) ||^2, where x_rec are the
features that the frozen tokenizer reconstructs from the image's own codes
(deterministic selection). One in ten conditions is dropped for guidance, and
an exponential mean of the weights is what gets evaluated and exported.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.diffusion import denoising, schedules
from lavit_jax.models.pixels import pixel_decoder
from lavit_jax.models.tokenizer import tokenizer
from lavit_jax.train.objectives import conditioning, diffusion
from lavit_jax.train.objectives.frozen import (
  abstract_params,
  branches,
  precision,
)


class PixelsObjective(diffusion.DiffusionObjective):
  """Trains a `pixels.PixelDecoder` on what the tokenizer reconstructs.

  A phase has, beside what every phase has, what `denoising.eps_sums` reads
  (the draws of an image share one pass of the tokenizer), and `ema_decay`.
  """

  part = "pixels"

  def __init__(self, config, where=None):
    super().__init__(config, where)
    words = self.stored.words(config.model_dir)
    made = precision.applied(config, encoder=words.vit, tokenizer=words)
    self.tokenizer_config = dataclasses.replace(
      made["tokenizer"], vit=made["encoder"]
    )
    self.tokenizer = tokenizer.DynamicVisualTokenizer(self.tokenizer_config)
    self.decoder_config = pixel_decoder.PixelDecoderConfig(
      **config.model.pixels.to_dict()
    )
    self.decoder = pixel_decoder.PixelDecoder(self.decoder_config)
    self.schedule = schedules.NoiseSchedule(**config.model.schedule.to_dict())
    self._check()
    self.use_images()

  def _check(self):
    ours, theirs = self.decoder_config, self.tokenizer_config
    wanted = {
      "feature_dim": theirs.width,
      "num_patches": theirs.num_patches,
      "image_size": self.config.data.image_size,
    }
    for name, value in wanted.items():
      if getattr(ours, name) != value:
        raise errors.ConfigError(
          f"model.pixels.{name}={getattr(ours, name)}, but the tokenizer and"
          f" the data of this run have {value}. Set"
          f" --config.model.pixels.{name}={value}."
        )
    denoising.check(self.schedule, self.last_phase)

  def made_of(self):
    """Data, encoder and tokenizer."""
    return super().made_of() | self.words_made_of()

  def init(self, rng):
    """Boxed parameters; extra: their exponential mean and its updates."""
    config = self.decoder_config
    size = config.image_size
    variables = self.decoder.init(
      rng,
      jnp.zeros((1, size, size, 3)),
      jnp.zeros((1,), jnp.int32),
      jnp.zeros((1, config.num_patches, config.feature_dim)),
    )
    params = variables["params"]
    return params, denoising.start_ema(params)

  def frozen_shapes(self):
    """Encoder and tokenizer."""
    config = self.tokenizer_config
    words = abstract_params.words(config)
    return {"encoder": abstract_params.encoder(config.vit), "tokenizer": words}

  def frozen_branches(self):
    """Encoder and tokenizer."""
    where = self.config.model_dir
    return {
      "encoder": branches.Branch(where, "encoder"),
      "tokenizer": branches.Branch(where, "tokenizer"),
    }

  def batch_shapes(self):
    """Images alone."""
    return self.image_shapes()

  def features(self, frozen, image):
    """x_rec float[B, N, D] of uint8[B, H, W, 3]; no gradient."""
    return conditioning.reconstructed_features(self.tokenizer, frozen, image)

  def draws(self, phase, batch, rng):
    """Steps, noise, and which conditions are dropped."""
    return denoising.draws(self.schedule, len(batch["image"]), phase, rng)

  def sums(self, phase, params, frozen, state, batch, draws):
    """The weighted squared error of eps of valid images."""
    del state
    sums = denoising.eps_sums(
      self._predict(params),
      self.schedule,
      conditioning.to_unit(batch["image"]),
      self.features(frozen, batch["image"]),
      batch["valid"],
      draws,
      phase,
    )
    return sums, {}

  def _predict(self, params):
    """The function that `denoising.eps_sums` asks for."""

    def predict(z, t, x_rec, drop):
      return self.decoder.apply({"params": params}, z, t, x_rec, drop=drop)

    return predict

  def held_out_metrics(self, params, frozen, state, batch):
    """Error of the mean weights, always under the same noise.

    `picture_mse` is that of the image predicted in one step from noise
    alone: what the condition tells, without any sampling.
    """
    rng = jax.random.key(0)
    phase = dict(self.last_phase) | {"condition_dropout": 0.0, "draws": 1}
    x = conditioning.to_unit(batch["image"])
    x_rec = self.features(frozen, batch["image"])
    _, metrics = denoising.eps_loss(
      self._predict(state["ema"]),
      self.schedule,
      x,
      x_rec,
      batch["valid"],
      rng,
      phase,
    )
    z = jax.random.normal(jax.random.fold_in(rng, 1), x.shape)
    last = jnp.full(x.shape[:1], self.schedule.num_steps - 1)
    output = self.decoder.apply({"params": state["ema"]}, z, last, x_rec)
    a = jnp.asarray(schedules.alphas_cumprod(self.schedule))[-1]
    guess = schedules.to_image(self.schedule, output, z, a)
    error = jnp.square(jnp.clip(guess, -1.0, 1.0) - x).mean((1, 2, 3))
    return metrics | {"picture_mse": denoising.mean(error, batch["valid"])}

  def export(self, params, state):
    """The mean weights; their config and schedule describe them."""
    del params
    return state["ema"], {
      "pixels": dataclasses.asdict(self.decoder_config),
      "schedule": dataclasses.asdict(self.schedule),
    }
