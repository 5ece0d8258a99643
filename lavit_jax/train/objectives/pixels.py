"""Stage `pixels`: a U-Net learns to redraw images from their visual tokens.

Paper section 3.2: || eps - eps_theta(z_t, t, x_rec) ||^2, where x_rec are the
features that the frozen tokenizer reconstructs from the image's own codes
(deterministic selection). One in ten conditions is dropped for guidance, and
an exponential mean of the weights is evaluated and exported.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from lavit_jax.core import errors
from lavit_jax.diffusion import denoising, schedules
from lavit_jax.models.pixels import pixel_decoder
from lavit_jax.models.tokenizer import tokenizer
from lavit_jax.train import phases
from lavit_jax.train.objectives import base, diffusion
from lavit_jax.train.objectives.frozen import (
  abstract_params,
  branches,
  conditioning,
  precision,
)
from lavit_jax.train.objectives.frozen import artifacts as artifacts_lib


class PixelsObjective(diffusion.DiffusionObjective):
  """Trains a `pixel_decoder.PixelDecoder` on reconstructed features.

  A phase has the settings of `denoising.eps_sums` (the draws of an image share
  one pass of the tokenizer), and `ema_decay`.
  """

  part = "pixels"

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    artifacts: artifacts_lib.Artifacts | None = None,
  ):
    super().__init__(config, artifacts)
    stored = self.artifacts.tokenizer_config(config.model_dir)
    networks = precision.applied(config, encoder=stored.vit, tokenizer=stored)
    self.tokenizer_config = dataclasses.replace(
      networks["tokenizer"], vit=networks["encoder"]
    )
    self.tokenizer = tokenizer.DynamicVisualTokenizer(self.tokenizer_config)
    self.decoder_config = pixel_decoder.PixelDecoderConfig(
      **config.model.pixels.to_dict()
    )
    self.decoder = pixel_decoder.PixelDecoder(self.decoder_config)
    self.schedule = schedules.NoiseSchedule(**config.model.schedule.to_dict())
    self._check()
    self._train_data, self._held_out_data = self.artifacts.image_batches(
      config, (self.source, self.held_out)
    )

  def _check(self) -> None:
    """Raises ConfigError unless decoder, tokenizer and data agree."""
    expected = {
      "feature_dim": self.tokenizer_config.width,
      "num_patches": self.tokenizer_config.num_patches,
      "image_size": self.config.data.image_size,
    }
    for name, value in expected.items():
      if getattr(self.decoder_config, name) != value:
        raise errors.ConfigError(
          f"model.pixels.{name}={getattr(self.decoder_config, name)}, but the"
          f" tokenizer and the data of this run have {value}. Set"
          f" --config.model.pixels.{name}={value}."
        )
    denoising.check(self.schedule, self.last_phase.settings)

  def provenance(self) -> dict[str, str]:
    """Returns data, encoder and tokenizer."""
    tokenizer = self.artifacts.tokenizer_provenance(self.config)
    return super().provenance() | tokenizer

  def init(self, rng: jax.Array) -> tuple[base.Params, base.Extra]:
    """Draws the parameters; extra: their exponential mean."""
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

  def frozen_shapes(self) -> base.Frozen:
    """Returns encoder and tokenizer."""
    config = self.tokenizer_config
    return {
      "encoder": abstract_params.encoder(config.vit),
      "tokenizer": abstract_params.tokenizer(config),
    }

  def frozen_branches(self) -> dict[str, branches.Branch]:
    """Returns encoder and tokenizer."""
    folder = self.config.model_dir
    return {
      "encoder": branches.Branch(folder, "encoder"),
      "tokenizer": branches.Branch(folder, "tokenizer"),
    }

  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns images alone."""
    return abstract_params.image_batch(self.config)

  def features(self, frozen: base.Frozen, image: jax.Array) -> jax.Array:
    """Returns x_rec float[B, N, D] of uint8[B, H, W, 3]; no gradient."""
    return conditioning.reconstructed_features(self.tokenizer, frozen, image)

  def draws(
    self, phase: phases.Phase, batch: base.Batch, rng: jax.Array
  ) -> base.Draws:
    """Draws steps, noise, and which conditions are dropped."""
    rows = len(batch["image"])
    return denoising.draws(self.schedule, rows, phase.settings, rng)

  def sums(
    self,
    phase: phases.Phase,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
    draws: base.Draws,
  ) -> tuple[base.Sums, base.Stats]:
    """Sums the weighted squared errors of eps of valid images; no stats."""
    del extra
    sums = denoising.eps_sums(
      self._predict(params),
      self.schedule,
      conditioning.to_unit(batch["image"]),
      self.features(frozen, batch["image"]),
      batch["valid"],
      draws,
      phase.settings,
    )
    return sums, {}

  def _predict(self, params: base.Params) -> denoising.Predict:
    """Returns the U-Net as `denoising.eps_sums` calls it."""

    def predict(z, t, x_rec, drop):
      return self.decoder.apply({"params": params}, z, t, x_rec, drop=drop)

    return predict

  def held_out_metrics(
    self,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
  ) -> dict[str, Any]:
    """Measures errors of the mean weights, always under the same noise.

    `picture_mse` is the error of the image predicted in one step from noise
    alone: what the condition determines, without sampling.
    """
    del params
    ema, rng = extra["ema"], jax.random.key(0)
    phase = self.last_phase.with_settings(condition_dropout=0.0, draws=1)
    x = conditioning.to_unit(batch["image"])
    x_rec = self.features(frozen, batch["image"])
    _, metrics = denoising.eps_loss(
      self._predict(ema),
      self.schedule,
      x,
      x_rec,
      batch["valid"],
      rng,
      phase.settings,
    )
    z = jax.random.normal(jax.random.fold_in(rng, 1), x.shape)
    last = jnp.full(x.shape[:1], self.schedule.num_steps - 1)
    output: Any = self.decoder.apply({"params": ema}, z, last, x_rec)
    a = jnp.asarray(schedules.alphas_cumprod(self.schedule))[-1]
    predicted = schedules.to_image(self.schedule, output, z, a)
    error = jnp.square(jnp.clip(predicted, -1.0, 1.0) - x).mean((1, 2, 3))
    return metrics | {"picture_mse": denoising.mean(error, batch["valid"])}

  def export(
    self, params: base.Params, extra: base.Extra
  ) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Returns the mean weights."""
    del params
    meta = {
      "pixels": dataclasses.asdict(self.decoder_config),
      "schedule": dataclasses.asdict(self.schedule),
    }
    return {self.part: (extra["ema"], meta)}
