"""What all stages of diffusion share: the loss on eps, and the mean weights.

Paper section 3.2: || eps - eps_theta(z_t, t, x_rec) ||^2, whatever the network
predicts and wherever it draws, in pixels or in the latents of an autoencoder.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lavit_jax.core import averages, errors
from lavit_jax.diffusion import schedules

WEIGHTINGS = ("none", "min_snr", "picture", "output")
Predict = Callable[[jax.Array, jax.Array, Any, jax.Array], jax.Array]


def check(schedule: schedules.NoiseSchedule, phase) -> None:
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
      ' says nothing of the image. Use prediction="velocity", or'
      " zero_snr=False."
    )


def loss_weights(
  schedule: schedules.NoiseSchedule, weighting: str, a, bound: float = 5.0
):
  """Factor of the squared error of the network's own output.

  With snr = a / (1 - a), the squared error of eps is snr times that of the
  image, and a times that of the velocity. As factors of the error of eps,
  "none" is the paper's 1; "min_snr" is min(snr, bound) / snr (Hang et al.,
  arXiv 2303.09556); "image" is min(snr + 1, bound) / snr: noisy steps, where
  the condition alone must say what to draw, count fully. "output" takes the
  network's own error as it is, the usual choice for velocities. Defined where
  nothing is left of the image, a = 0, too.

  Args:
    schedule: its prediction counts.
    weighting: one of `WEIGHTINGS`.
    a: float[B], alphas_cumprod of the steps.
    bound: of "min_snr" and "image".

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
  of_image = {
    "none": snr,
    "min_snr": jnp.minimum(snr, bound),
    "picture": jnp.minimum(snr + 1.0, bound),
  }[weighting]
  if schedule.prediction == "velocity":
    return of_image * (1 - a)
  return of_image


def output_error(schedule: schedules.NoiseSchedule, output, x, noise, a):
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


def steps_of_strata(schedule: schedules.NoiseSchedule, count: int, rng):
  """int[count]: one step of every stratum; the mean over a batch varies less.

  In random order.
  """
  strata = jnp.arange(count) + jax.random.uniform(rng, (count,))
  strata = jax.random.permutation(jax.random.fold_in(rng, 1), strata)
  t = (strata / count * schedule.num_steps).astype(jnp.int32)
  return jnp.minimum(t, schedule.num_steps - 1)


def draws(schedule, rows: int, phase, rng) -> dict[str, jax.Array]:
  """What is random of a whole batch, by its rows: it can be cut like them.

  Args:
    schedule: a `schedules.NoiseSchedule`.
    rows: B, of the whole batch, whose steps are one of each stratum.
    phase: `draws` and `condition_dropout`, see `eps_sums`.
    rng: a key.

  Returns:
    {"t": int[B, draws] steps, "drop": bool[B, draws] untold, "noise": key[B]}.
  """
  shape = (rows, int(phase["draws"]))
  t_key, noise_key, drop_key = jax.random.split(rng, 3)
  steps = steps_of_strata(schedule, rows * shape[1], t_key)
  return {
    "t": steps.reshape(shape),
    "drop": jax.random.bernoulli(drop_key, phase["condition_dropout"], shape),
    "noise": jax.random.split(noise_key, rows),
  }


def normal(keys: jax.Array, shape) -> jax.Array:
  """Standard normal float32[B, *shape] of one key a row."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def eps_sums(
  predict: Predict, schedule, x, condition, valid, drawn, phase
) -> dict[str, jax.Array]:
  """Sums over rows of a batch, every image at `phase["draws"]` noise levels.

  Args:
    predict: (z [B, ...], t int[B], condition, drop bool[B]) -> the network's
      output; where `drop` is True it is told nothing.
    schedule: a `schedules.NoiseSchedule`.
    x: float[B, ...], clean images or latents.
    condition: tree of arrays [B, ...].
    valid: float[B], the weight of each image.
    drawn: of `draws`, of these rows.
    phase: `weighting` (see `loss_weights`), `min_snr` (its bound) and `draws`
      (noisy versions of each image a step).

  Returns:
    For `combine`: each float32[].
  """
  repeats = int(phase["draws"])
  eps = normal(drawn["noise"], (repeats, *x.shape[1:]))
  eps = eps.reshape(-1, *x.shape[1:])  # [B * draws, ...]
  if repeats > 1:
    x, condition, valid = jax.tree.map(
      lambda v: jnp.repeat(v, repeats, axis=0), (x, condition, valid)
    )
  t, drop = drawn["t"].reshape(-1), drawn["drop"].reshape(-1)
  z = schedules.add_noise(schedule, x, eps, t)
  output = predict(z, t, condition, drop)
  a = jnp.asarray(schedules.alphas_cumprod(schedule))[t]
  own = output_error(schedule, output, x, eps, a)
  weights = loss_weights(schedule, phase["weighting"], a, phase["min_snr"])
  error = schedules.eps_error(schedule, output, x, eps, a)
  noisy = valid * (t >= schedule.num_steps // 2)
  return {
    "loss": (own * weights * valid).sum(),
    "eps_mse": (error * valid).sum(),
    "eps_mse_noisy": (error * noisy).sum(),
    "noisy": noisy.sum(),
    "shown": valid.sum(),
  }


def norms(valid: jax.Array, phase) -> dict[str, jax.Array]:
  """What the loss of `eps_sums` is divided by, of float[B] weights."""
  return {"shown": valid.sum() * int(phase["draws"])}


def combine(sums) -> tuple[jax.Array, averages.Metrics]:
  """The loss float32[] of sums over a batch, and its metrics.

  `eps_mse_noisy` is over the noisier half of the steps.
  """
  metrics = {
    "loss": averages.mean(sums["loss"], sums["shown"]),
    "eps_mse": averages.mean(sums["eps_mse"], sums["shown"]),
    "eps_mse_noisy": averages.mean(sums["eps_mse_noisy"], sums["noisy"]),
  }
  return averages.ratio(sums["loss"], sums["shown"]), metrics


def eps_loss(
  predict: Predict, schedule, x, condition, valid, rng, phase
) -> tuple[jax.Array, averages.Metrics]:
  """Loss and metrics of a whole batch; arguments as of `eps_sums`, and a key.

  `phase` has `condition_dropout` too.
  """
  drawn = draws(schedule, x.shape[0], phase, rng)
  return combine(eps_sums(predict, schedule, x, condition, valid, drawn, phase))


def start_ema(params) -> dict[str, Any]:
  """The exponential mean of weights before the first step."""
  ema = jax.tree.map(lambda x: x.copy(), params)
  return {"ema": ema, "updates": jnp.zeros((), jnp.int32)}


def update_ema(state, params, decay: float) -> dict[str, Any]:
  """The exponential mean after one more step; young means forget faster.

  Args:
    state: of `start_ema`.
    params: after the step's update: with a decay of 0 the mean is the newest
      model.
    decay: share of the old mean that stays.
  """
  updates = state["updates"]
  decay = jnp.minimum(decay, (1.0 + updates) / (10.0 + updates))
  ema = jax.tree.map(
    lambda mean, new: decay * mean + (1.0 - decay) * jax.lax.stop_gradient(new),
    state["ema"],
    params,
  )
  return {"ema": ema, "updates": updates + 1}


def mean(values: jax.Array, weights: jax.Array):
  """Weighted mean of float[B], as a metric."""
  return averages.mean((values * weights).sum(), weights.sum())
