"""Stage `pixels`: a U-Net learns to redraw pictures from their tokens.

Paper section 3.2: || eps - eps_theta(z_t, t, x_rec) ||^2, where x_rec are the
features that the frozen tokenizer reconstructs from the picture's own codes
(deterministic selection). One in ten conditions is dropped for guidance, and
an exponential mean of the weights is what gets evaluated and exported.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lavit_jax import errors
from lavit_jax.infer import schedules
from lavit_jax.models import pixels, tokenizer
from lavit_jax.train import (
  branches,
  conditions,
  denoising,
  precision,
  shapes,
)
from lavit_jax.train.objectives import base


class PixelsObjective(base.Objective):
  """Trains a `pixels.PixelDecoder` on what the tokenizer reconstructs.

  A phase has, beside what every phase has, what `denoising.eps_loss` reads
  (the draws of a picture share one pass of the tokenizer), and `ema_decay`.
  """

  part = "pixels"
  best_metric = "loss"
  best_mode = "min"

  def __init__(self, config, where=None):
    super().__init__(config, where)
    words = self.stored.words(config.model_dir)
    made = precision.applied(config, encoder=words.vit, tokenizer=words)
    self.tokenizer_config = dataclasses.replace(
      made["tokenizer"], vit=made["encoder"]
    )
    self.tokenizer = tokenizer.DynamicVisualTokenizer(self.tokenizer_config)
    self.decoder_config = pixels.PixelDecoderConfig(
      **config.model.pixels.to_dict()
    )
    self.decoder = pixels.PixelDecoder(self.decoder_config)
    self.schedule = schedules.Schedule(**config.model.schedule.to_dict())
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
    words = shapes.words(config)
    return {"encoder": shapes.encoder(config.vit), "tokenizer": words}

  def frozen_branches(self):
    """Encoder and tokenizer."""
    where = self.config.model_dir
    return {
      "encoder": branches.Branch(where, "encoder"),
      "tokenizer": branches.Branch(where, "tokenizer"),
    }

  def batch_shapes(self):
    """Pictures alone."""
    return self.image_shapes()

  def features(self, frozen, image):
    """x_rec float[B, N, D] of uint8[B, H, W, 3]; no gradient."""
    return conditions.reconstructed_features(self.tokenizer, frozen, image)

  def _eps_loss(self, params, frozen, batch, rng, phase):
    """`denoising.eps_loss` of the decoder with these weights."""

    def predict(z, t, x_rec, drop):
      return self.decoder.apply({"params": params}, z, t, x_rec, drop=drop)

    return denoising.eps_loss(
      predict,
      self.schedule,
      conditions.to_unit(batch["image"]),
      self.features(frozen, batch["image"]),
      batch["valid"],
      rng,
      phase,
    )

  def loss(self, phase, params, frozen, state, batch, rng):
    """Weighted mean of the squared error of eps over valid pictures."""
    loss, metrics = self._eps_loss(params, frozen, batch, rng, phase)
    state = denoising.update_ema(state, params, phase["ema_decay"])
    return loss, (state, metrics)

  def held_out_metrics(self, params, frozen, state, batch):
    """Error of the mean weights, always under the same noise.

    `picture_mse` is that of the picture predicted in one step from noise
    alone: what the condition tells, without any sampling.
    """
    rng = jax.random.key(0)
    phase = dict(self.last_phase) | {"condition_dropout": 0.0, "draws": 1}
    loss, metrics = self._eps_loss(state["ema"], frozen, batch, rng, phase)
    x = conditions.to_unit(batch["image"])
    x_rec = self.features(frozen, batch["image"])
    z = jax.random.normal(jax.random.fold_in(rng, 1), x.shape)
    last = jnp.full(x.shape[:1], self.schedule.num_steps - 1)
    output = self.decoder.apply({"params": state["ema"]}, z, last, x_rec)
    a = jnp.asarray(schedules.alphas_cumprod(self.schedule))[-1]
    guess = schedules.to_picture(self.schedule, output, z, a)
    error = jnp.square(jnp.clip(guess, -1.0, 1.0) - x).mean((1, 2, 3))
    metrics["picture_mse"] = denoising.mean(error, batch["valid"])
    return metrics | {"loss": loss}

  def export(self, params, state):
    """The mean weights; their config and schedule describe them."""
    del params
    return state["ema"], {
      "pixels": dataclasses.asdict(self.decoder_config),
      "schedule": dataclasses.asdict(self.schedule),
    }
