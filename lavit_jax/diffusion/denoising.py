"""The denoising loss, and the exponential moving average of weights.

LaVIT, arXiv 2309.04669, section 3.2: || eps - eps_theta(z_t, t, x_rec) ||^2.
All stages with a U-Net share it: in pixels or in latents, for networks that
predict the noise, the image or the velocity.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lavit_jax.core import averages, errors
from lavit_jax.diffusion import schedules

WEIGHTINGS = ("none", "min_snr", "picture", "output")
Predict = Callable[[jax.Array, jax.Array, Any, jax.Array], jax.Array]


def check(schedule: schedules.NoiseSchedule, phase: Mapping[str, Any]) -> None:
  """Checks that the schedule allows the weighting of a phase.

  Raises:
    errors.ConfigError: it does not, or the weighting is unknown.
  """
  weighting = phase["weighting"]
  if weighting not in WEIGHTINGS:
    raise errors.ConfigError(
      f"weighting={weighting!r} of a phase is unknown: expected one of"
      f" {WEIGHTINGS}."
    )
  if schedule.prediction != "epsilon":
    return
  if weighting == "picture":
    raise errors.ConfigError(
      'weighting="picture" divides by the signal-to-noise ratio. With'
      ' model.schedule.prediction="epsilon" the factor has no bound (a million'
      ' at the last cosine step). Use prediction="sample", or'
      ' weighting="none".'
    )
  if schedule.zero_snr:
    raise errors.ConfigError(
      "model.schedule.zero_snr=True ends in pure noise, from which predicted"
      ' noise gives no image. Use prediction="velocity", or zero_snr=False.'
    )


def loss_weights(
  schedule: schedules.NoiseSchedule,
  weighting: str,
  a: jax.Array,
  bound: float = 5.0,
) -> jax.Array:
  """Returns factors float[B] of the squared error of the network's output.

  With snr = a / (1 - a), the squared error of eps is snr times that of the
  image, and a times that of the velocity. As factors of the error of eps the
  weightings are:

    none     1, as in the paper
    min_snr  min(snr, bound) / snr (Hang et al., arXiv 2303.09556)
    picture  min(snr + 1, bound) / snr: noisy steps, at which only the
             condition tells the image, have full weight

  "output" is the plain error of the output, the usual choice for velocities.
  All factors are finite at a = 0, too.

  Args:
    schedule: tells the prediction.
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
  image_weight = {
    "none": snr,
    "min_snr": jnp.minimum(snr, bound),
    "picture": jnp.minimum(snr + 1.0, bound),
  }[weighting]
  if schedule.prediction == "velocity":
    return image_weight * (1 - a)
  return image_weight


def output_error(
  schedule: schedules.NoiseSchedule,
  output: jax.Array,
  x: jax.Array,
  noise: jax.Array,
  a: jax.Array,
) -> jax.Array:
  """Returns the mean squared error of the network's output, float32[B].

  Arguments are those of `schedules.eps_error`.
  """
  axes = tuple(range(1, x.ndim))
  a = a.reshape(a.shape + (1,) * (x.ndim - 1))
  target = {
    "epsilon": lambda: noise,
    "sample": lambda: x,
    "velocity": lambda: jnp.sqrt(a) * noise - jnp.sqrt(1 - a) * x,
  }[schedule.prediction]()
  return jnp.square(output - target).mean(axes)


def stratified_steps(
  schedule: schedules.NoiseSchedule, count: int, rng: jax.Array
) -> jax.Array:
  """Draws int[count] steps, one of every stratum, in random order.

  The mean loss over a batch varies less than with independent steps.
  """
  strata = jnp.arange(count) + jax.random.uniform(rng, (count,))
  strata = jax.random.permutation(jax.random.fold_in(rng, 1), strata)
  t = (strata / count * schedule.num_steps).astype(jnp.int32)
  return jnp.minimum(t, schedule.num_steps - 1)


def draws(
  schedule: schedules.NoiseSchedule,
  rows: int,
  phase: Mapping[str, Any],
  rng: jax.Array,
) -> dict[str, jax.Array]:
  """Draws all random numbers of a batch, row by row.

  A batch that is split for accumulation splits them like its other arrays.

  Args:
    schedule: a `schedules.NoiseSchedule`.
    rows: B, of the whole batch, whose steps are stratified.
    phase: `draws` and `condition_dropout`, see `eps_sums`.
    rng: a key.

  Returns:
    Steps `t` int[B, draws], `drop` bool[B, draws], True where the network is
    unconditioned, and `noise`, keys[B].
  """
  shape = (rows, int(phase["draws"]))
  t_key, noise_key, drop_key = jax.random.split(rng, 3)
  steps = stratified_steps(schedule, rows * shape[1], t_key)
  return {
    "t": steps.reshape(shape),
    "drop": jax.random.bernoulli(drop_key, phase["condition_dropout"], shape),
    "noise": jax.random.split(noise_key, rows),
  }


def normal(keys: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Draws standard normal float32[B, *shape] from one key per row."""
  return jax.vmap(lambda key: jax.random.normal(key, tuple(shape)))(keys)


def eps_sums(
  predict: Predict,
  schedule: schedules.NoiseSchedule,
  x: jax.Array,
  condition: Any,
  valid: jax.Array,
  drawn: Mapping[str, jax.Array],
  phase: Mapping[str, Any],
) -> dict[str, jax.Array]:
  """Computes sums of losses and errors over rows of a batch.

  Args:
    predict: maps (z [B, ...], t int[B], condition, drop bool[B]) to the
      network's output; where `drop` is True it is unconditioned.
    schedule: a `schedules.NoiseSchedule`.
    x: float[B, ...], clean images or latents.
    condition: tree of arrays [B, ...].
    valid: float[B], the weight of each image.
    drawn: of `draws`, for these rows.
    phase: `weighting` (see `loss_weights`), `min_snr` (its bound) and `draws`
      (noise levels per image and step).

  Returns:
    Sums float32[] for `combine`.
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
  output_mse = output_error(schedule, output, x, eps, a)
  weights = loss_weights(schedule, phase["weighting"], a, phase["min_snr"])
  error = schedules.eps_error(schedule, output, x, eps, a)
  noisy = valid * (t >= schedule.num_steps // 2)
  return {
    "loss": (output_mse * weights * valid).sum(),
    "eps_mse": (error * valid).sum(),
    "eps_mse_noisy": (error * noisy).sum(),
    "noisy": noisy.sum(),
    "shown": valid.sum(),
  }


def norms(valid: jax.Array, phase: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Returns the divisor of the loss of `eps_sums`, from weights float[B]."""
  return {"shown": valid.sum() * int(phase["draws"])}


def combine(
  sums: Mapping[str, jax.Array],
) -> tuple[jax.Array, averages.Metrics]:
  """Returns the loss float32[] and the metrics from sums of `eps_sums`.

  The metric `eps_mse_noisy` covers the noisier half of the steps.
  """
  metrics = {
    "loss": averages.mean(sums["loss"], sums["shown"]),
    "eps_mse": averages.mean(sums["eps_mse"], sums["shown"]),
    "eps_mse_noisy": averages.mean(sums["eps_mse_noisy"], sums["noisy"]),
  }
  return averages.ratio(sums["loss"], sums["shown"]), metrics


def eps_loss(
  predict: Predict,
  schedule: schedules.NoiseSchedule,
  x: jax.Array,
  condition: Any,
  valid: jax.Array,
  rng: jax.Array,
  phase: Mapping[str, Any],
) -> tuple[jax.Array, averages.Metrics]:
  """Returns loss and metrics of a whole batch.

  Arguments are those of `eps_sums`, with a key in place of the drawn numbers;
  `phase` has `condition_dropout`, too.
  """
  drawn = draws(schedule, x.shape[0], phase, rng)
  return combine(eps_sums(predict, schedule, x, condition, valid, drawn, phase))


def start_ema(params: Any) -> dict[str, Any]:
  """Returns the moving average of weights before the first step."""
  ema = jax.tree.map(lambda x: x.copy(), params)
  return {"ema": ema, "updates": jnp.zeros((), jnp.int32)}


def update_ema(
  state: Mapping[str, Any], params: Any, decay: float
) -> dict[str, Any]:
  """Returns the moving average after one more step.

  The decay of step i is at most (1 + i) / (10 + i), so that the first weights
  are soon forgotten.

  Args:
    state: of `start_ema`.
    params: weights after the update of the step; with a decay of 0 they are
      the average.
    decay: share of the old average that stays.
  """
  updates = state["updates"]
  bounded = jnp.minimum(decay, (1.0 + updates) / (10.0 + updates))

  def average(mean, new):
    return bounded * mean + (1.0 - bounded) * jax.lax.stop_gradient(new)

  ema = jax.tree.map(average, state["ema"], params)
  return {"ema": ema, "updates": updates + 1}


def mean(values: jax.Array, weights: jax.Array) -> averages.Metric:
  """Returns the weighted mean of float[B] as a metric."""
  return averages.mean((values * weights).sum(), weights.sum())
