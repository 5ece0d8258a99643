"""What all stages of diffusion share: the loss on eps, and the mean weights.

Paper section 3.2: || eps - eps_theta(z_t, t, x_rec) ||^2, whatever the network
predicts and wherever it draws, in pixels or in the latents of an autoencoder.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lavit_jax import errors
from lavit_jax.infer import schedules

WEIGHTINGS = ("none", "min_snr", "picture", "output")
Predict = Callable[[jax.Array, jax.Array, Any, jax.Array], jax.Array]


def check(schedule: schedules.Schedule, phase) -> None:
  """Raises ConfigError for a weighting that the schedule does not allow."""
  weighting = phase["weighting"]
  if weighting not in WEIGHTINGS:
    raise errors.ConfigError(
      f"weighting={weighting!r} of a phase is none of {WEIGHTINGS}."
    )
  if schedule.prediction != "epsilon":
    return
  if weighting == "picture":
    raise errors.ConfigError(
      'weighting="picture" divides by the signal-to-noise ratio, which for'
      ' model.schedule.prediction="epsilon" has no bound (a million at the'
      ' last cosine step). Use prediction="sample", or weighting="none".'
    )
  if schedule.zero_snr:
    raise errors.ConfigError(
      "model.schedule.zero_snr=True ends in pure noise, where predicted noise"
      ' says nothing of the picture. Use prediction="velocity", or'
      " zero_snr=False."
    )


def loss_weights(
  schedule: schedules.Schedule, weighting: str, a, bound: float = 5.0
):
  """Factor of the squared error of the network's own output.

  With snr = a / (1 - a), the squared error of eps is snr times that of the
  picture, and a times that of the velocity. As factors of the error of eps,
  "none" is the paper's 1; "min_snr" is min(snr, bound) / snr (Hang et al.,
  arXiv 2303.09556); "picture" is min(snr + 1, bound) / snr: noisy steps, where
  the condition alone must say what to draw, count fully. "output" takes the
  network's own error as it is, the usual choice for velocities. Defined where
  nothing is left of the picture, a = 0, too.

  Args:
    schedule: its prediction counts.
    weighting: one of `WEIGHTINGS`.
    a: float[B], alphas_cumprod of the steps.
    bound: of "min_snr" and "picture".

  Raises:
    errors.ConfigError: see `check`.
  """
  check(schedule, {"weighting": weighting})
  if weighting == "output":
    return jnp.ones_like(a)
  if schedule.prediction == "epsilon":
    if weighting == "none":
      return jnp.ones_like(a)
    return jnp.minimum(1.0, bound * (1 - a) / a)
  snr = a / (1 - a)
  of_picture = {
    "none": snr,
    "min_snr": jnp.minimum(snr, bound),
    "picture": jnp.minimum(snr + 1.0, bound),
  }[weighting]
  if schedule.prediction == "velocity":
    return of_picture * (1 - a)
  return of_picture


def output_error(schedule: schedules.Schedule, output, x, noise, a):
  """Mean squared error of the network's own output, float32[B].

  Arguments as of `schedules.eps_error`.
  """
  axes = tuple(range(1, x.ndim))
  wide = a.reshape(a.shape + (1,) * (x.ndim - 1))
  target = {
    "epsilon": lambda: noise,
    "sample": lambda: x,
    "velocity": lambda: jnp.sqrt(wide) * noise - jnp.sqrt(1 - wide) * x,
  }[schedule.prediction]()
  return jnp.square(output - target).mean(axes)


def steps_of_strata(schedule: schedules.Schedule, count: int, rng):
  """int[count]: one step of every stratum; the mean over a batch varies less.

  In random order.
  """
  strata = jnp.arange(count) + jax.random.uniform(rng, (count,))
  strata = jax.random.permutation(jax.random.fold_in(rng, 1), strata)
  t = (strata / count * schedule.num_steps).astype(jnp.int32)
  return jnp.minimum(t, schedule.num_steps - 1)


def eps_loss(
  predict: Predict, schedule, x, condition, valid, rng, phase
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss and its metrics, every picture at `phase["draws"]` noise levels.

  Args:
    predict: (z [B, ...], t int[B], condition, drop bool[B]) -> the network's
      output; where `drop` is True it is told nothing.
    schedule: a `schedules.Schedule`.
    x: float[B, ...], clean pictures or latents.
    condition: tree of arrays [B, ...].
    valid: float[B], the weight of each picture.
    rng: a key.
    phase: `condition_dropout`, `weighting` (see `loss_weights`), `min_snr`
      (its bound) and `draws` (noisy versions of each picture a step).

  Returns:
    (loss float32[], {"eps_mse": ..., "eps_mse_noisy": ...}), the second
    over the noisier half of the steps.
  """
  draws = int(phase["draws"])
  if draws > 1:
    x, condition, valid = jax.tree.map(
      lambda v: jnp.repeat(v, draws, axis=0), (x, condition, valid)
    )
  count = x.shape[0]
  t_key, noise_key, drop_key = jax.random.split(rng, 3)
  t = steps_of_strata(schedule, count, t_key)
  eps = jax.random.normal(noise_key, x.shape)
  drop = jax.random.bernoulli(drop_key, phase["condition_dropout"], (count,))
  z = schedules.add_noise(schedule, x, eps, t)
  output = predict(z, t, condition, drop)
  a = jnp.asarray(schedules.alphas_cumprod(schedule))[t]
  own = output_error(schedule, output, x, eps, a)
  weights = loss_weights(schedule, phase["weighting"], a, phase["min_snr"])
  error = schedules.eps_error(schedule, output, x, eps, a)
  noisy = valid * (t >= schedule.num_steps // 2)
  metrics = {"eps_mse": mean(error, valid), "eps_mse_noisy": mean(error, noisy)}
  return mean(own * weights, valid), metrics


def start_ema(params) -> dict[str, Any]:
  """The exponential mean of weights before the first step."""
  ema = jax.tree.map(lambda x: x.copy(), params)
  return {"ema": ema, "updates": jnp.zeros((), jnp.int32)}


def update_ema(state, params, decay: float) -> dict[str, Any]:
  """The exponential mean after one more step; young means forget faster."""
  updates = state["updates"]
  decay = jnp.minimum(decay, (1.0 + updates) / (10.0 + updates))
  ema = jax.tree.map(
    lambda mean, new: decay * mean + (1.0 - decay) * jax.lax.stop_gradient(new),
    state["ema"],
    params,
  )
  return {"ema": ema, "updates": updates + 1}


def mean(values: jax.Array, weights: jax.Array) -> jax.Array:
  """Weighted mean of float[B]; 0 where all weights are."""
  return (values * weights).sum() / jnp.maximum(weights.sum(), 1.0)
