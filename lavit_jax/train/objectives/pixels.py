"""Stage `pixels`: a U-Net learns to redraw pictures from their tokens.

Paper section 3.2: || eps - eps_theta(z_t, t, x_rec) ||^2, where x_rec are the
features that the frozen tokenizer reconstructs from the picture's own codes
(deterministic selection). One in ten conditions is dropped for guidance, and
an exponential mean of the weights is what gets evaluated and exported.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lavit_jax import checkpoints, errors, images
from lavit_jax.infer import schedules
from lavit_jax.models import pixels, selector, tokenizer
from lavit_jax.train.objectives import base

WEIGHTINGS = ("none", "min_snr", "picture")


class PixelsObjective(base.Objective):
  """Trains a `pixels.PixelDecoder` on what the tokenizer reconstructs.

  A phase has, beside what every phase has: `condition_dropout`, `weighting`
  (see `loss_weights`), `min_snr` (its bound), `draws` (noisy versions of each
  picture a step; they share one pass of the tokenizer) and `ema_decay`.
  """

  part = "pixels"
  best_metric = "loss"
  best_mode = "min"

  def __init__(self, config):
    super().__init__(config)
    encoder = checkpoints.load_part(config.model_dir, "encoder")
    stage1 = checkpoints.load_part(config.model_dir, "tokenizer")
    self.tokenizer_config = tokenizer.config_from_dict(stage1.meta["tokenizer"])
    self.tokenizer = tokenizer.DynamicVisualTokenizer(self.tokenizer_config)
    variables = {k: stage1.params[k] for k in ("params", "codebook")}
    self.frozen = {"encoder": encoder.params, "tokenizer": variables}
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
    weighting = self.last_phase["weighting"]
    if weighting == "picture" and self.schedule.prediction == "epsilon":
      raise errors.ConfigError(
        'weighting="picture" divides by the signal-to-noise ratio, which for'
        ' model.schedule.prediction="epsilon" has no bound (a million at the'
        ' last cosine step). Use prediction="sample", or weighting="none".'
      )

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
    ema = jax.tree.map(jnp.copy, params)
    return params, {"ema": ema, "updates": jnp.zeros((), jnp.int32)}

  def features(self, frozen, image):
    """x_rec float[B, N, D] of uint8[B, H, W, 3]; no gradient."""
    return jax.lax.stop_gradient(
      reconstructed_features(self.tokenizer, frozen, image)
    )

  def loss(self, phase, params, frozen, state, batch, rng):
    """Weighted mean of the squared error of eps over valid pictures."""
    x_rec = self.features(frozen, batch["image"])
    loss, metrics = eps_loss(
      self.decoder,
      self.schedule,
      params,
      to_unit(batch["image"]),
      x_rec,
      batch["valid"],
      rng,
      phase,
    )
    state = update_ema(state, params, phase["ema_decay"])
    return loss, (state, metrics)

  def held_out_metrics(self, params, frozen, state, batch):
    """Error of the mean weights, always under the same noise.

    `picture_mse` is that of the picture predicted in one step from noise
    alone: what the condition tells, without any sampling.
    """
    x, valid = to_unit(batch["image"]), batch["valid"]
    x_rec = self.features(frozen, batch["image"])
    rng = jax.random.key(0)
    phase = dict(self.last_phase) | {"condition_dropout": 0.0, "draws": 1}
    loss, metrics = eps_loss(
      self.decoder, self.schedule, state["ema"], x, x_rec, valid, rng, phase
    )
    z = jax.random.normal(jax.random.fold_in(rng, 1), x.shape)
    last = jnp.full(x.shape[:1], self.schedule.num_steps - 1)
    output = self.decoder.apply({"params": state["ema"]}, z, last, x_rec)
    a = jnp.asarray(schedules.alphas_cumprod(self.schedule))[-1]
    guess = schedules.to_picture(self.schedule, output, z, a)
    error = jnp.square(jnp.clip(guess, -1.0, 1.0) - x).mean((1, 2, 3))
    metrics["picture_mse"] = _mean(error, valid)
    return metrics | {"loss": loss}

  def export(self, params, state):
    """The mean weights; their config and schedule describe them."""
    del params
    return state["ema"], {
      "pixels": dataclasses.asdict(self.decoder_config),
      "schedule": dataclasses.asdict(self.schedule),
    }


def reconstructed_features(model, frozen, image):
  """What the tokenizer makes of pictures: picture -> codes -> x_rec.

  Args:
    model: a `tokenizer.DynamicVisualTokenizer`.
    frozen: {"encoder": params, "tokenizer": {"params", "codebook"}}.
    image: uint8[B, H, W, 3].

  Returns:
    float[B, N, D], from the expected number of tokens (deterministic).
  """
  variables, config = frozen["tokenizer"], model.config
  features = tokenizer.encode_images(
    config, frozen["encoder"], images.normalize(image)
  )
  log_probs = model.apply(variables, features, method="select")
  keep = selector.expected_count_mask(log_probs).astype(bool)
  _, ids, valid = model.apply(
    variables, features, keep, config.num_patches, method="encode"
  )
  return model.apply(variables, ids, valid, method="decode_codes")


def to_unit(image):
  """uint8[B, H, W, 3] as float32 in [-1, 1]."""
  return image.astype(jnp.float32) / 127.5 - 1.0


def loss_weights(weighting: str, a, bound: float = 5.0):
  """Factor of the squared error of eps at levels a = alphas_cumprod[t].

  With snr = a / (1 - a), the squared error of eps is snr times that of the
  picture. "none" is the paper's 1; "min_snr" is min(snr, bound) / snr (Hang
  et al., arXiv 2303.09556); "picture" is min(snr + 1, bound) / snr: noisy
  steps, where the condition alone must say what to draw, count fully.

  Raises:
    errors.ConfigError: no such weighting.
  """
  snr = a / (1 - a)
  if weighting == "none":
    return jnp.ones_like(a)
  if weighting == "min_snr":
    return jnp.minimum(snr, bound) / snr
  if weighting == "picture":
    return jnp.minimum(snr + 1.0, bound) / snr
  raise errors.ConfigError(
    f"weighting={weighting!r} of a pixels phase is none of {WEIGHTINGS}."
  )


def eps_loss(decoder, schedule, params, x, x_rec, valid, rng, phase):
  """The loss and its metrics, every picture at `phase["draws"]` noise levels.

  Args:
    decoder: a `pixels.PixelDecoder`.
    schedule: a `schedules.Schedule`.
    params: of the decoder.
    x: float[B, H, W, 3] in [-1, 1].
    x_rec: float[B, N, D].
    valid: float[B], the weight of each picture.
    rng: a key.
    phase: see `PixelsObjective`.

  Returns:
    (loss float32[], {"eps_mse": ..., "eps_mse_noisy": ...}), the second
    over the noisier half of the steps.
  """
  draws = int(phase["draws"])
  x, x_rec, valid = (jnp.repeat(v, draws, axis=0) for v in (x, x_rec, valid))
  count = x.shape[0]
  t_key, noise_key, drop_key = jax.random.split(rng, 3)
  # One step of every stratum: the mean over a batch varies less.
  strata = jnp.arange(count) + jax.random.uniform(t_key, (count,))
  strata = jax.random.permutation(jax.random.fold_in(t_key, 1), strata)
  t = (strata / count * schedule.num_steps).astype(jnp.int32)
  t = jnp.minimum(t, schedule.num_steps - 1)
  eps = jax.random.normal(noise_key, x.shape)
  drop = jax.random.bernoulli(drop_key, phase["condition_dropout"], (count,))
  z = schedules.add_noise(schedule, x, eps, t)
  output = decoder.apply({"params": params}, z, t, x_rec, drop=drop)
  a = jnp.asarray(schedules.alphas_cumprod(schedule))[t]
  error = schedules.eps_error(schedule, output, x, eps, a)
  weights = loss_weights(phase["weighting"], a, phase["min_snr"])
  noisy = valid * (t >= schedule.num_steps // 2)
  metrics = {
    "eps_mse": _mean(error, valid),
    "eps_mse_noisy": _mean(error, noisy),
  }
  return _mean(error * weights, valid), metrics


def update_ema(state, params, decay: float):
  """The exponential mean after one more step; young means forget faster."""
  updates = state["updates"]
  decay = jnp.minimum(decay, (1.0 + updates) / (10.0 + updates))
  ema = jax.tree.map(
    lambda mean, new: decay * mean + (1.0 - decay) * jax.lax.stop_gradient(new),
    state["ema"],
    params,
  )
  return {"ema": ema, "updates": updates + 1}


def _mean(values, weights):
  return (values * weights).sum() / jnp.maximum(weights.sum(), 1.0)
