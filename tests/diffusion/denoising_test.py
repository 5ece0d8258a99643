"""The denoising loss: errors, weights, random numbers, moving average."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.diffusion import denoising, schedules

_SCHEDULES = {
  name: dataclasses.replace(schedules.STABLE_DIFFUSION, prediction=name)
  for name in schedules.PREDICTIONS
}
_A = np.array([0.999, 0.9, 0.5, 0.1, 0.004], np.float32)
_PHASE = {
  "condition_dropout": 0.0,
  "weighting": "none",
  "min_snr": 5.0,
  "draws": 1,
}


def _case():
  """Images, noise, noisy images and a wrong prediction of all three."""
  keys = jax.random.split(jax.random.key(0), 3)
  x, noise, off = (jax.random.normal(k, (5, 4, 4, 3)) for k in keys)
  a = _A.reshape(-1, 1, 1, 1)
  return x, noise, jnp.sqrt(a) * x + jnp.sqrt(1 - a) * noise, off


def _output(prediction, x, noise, z):
  """The network's output that stands for image x and this noise."""
  a = _A.reshape(-1, 1, 1, 1)
  if prediction == "epsilon":
    return noise
  return (
    x if prediction == "sample" else np.sqrt(a) * noise - np.sqrt(1 - a) * x
  )


@pytest.mark.parametrize("prediction", schedules.PREDICTIONS)
def test_the_error_of_the_right_output_is_zero(prediction):
  x, noise, z, _ = _case()
  right = _output(prediction, x, noise, z)
  error = denoising.output_error(_SCHEDULES[prediction], right, x, noise, _A)
  np.testing.assert_allclose(error, 0, atol=1e-10)
  wrong = denoising.output_error(
    _SCHEDULES[prediction], right + 2, x, noise, _A
  )
  np.testing.assert_allclose(wrong, 4, rtol=1e-5)


_FACTORS = {  # of the squared error of eps
  "none": lambda snr: np.ones_like(snr),
  "min_snr": lambda snr: np.minimum(snr, 5) / snr,
  "picture": lambda snr: np.minimum(snr + 1, 5) / snr,
}


@pytest.mark.parametrize("weighting", sorted(_FACTORS))
@pytest.mark.parametrize("prediction", schedules.PREDICTIONS)
def test_weights_are_their_definitions_for_every_prediction(
  prediction, weighting
):
  """Weight times output error = factor times error of the implied eps."""
  schedule = _SCHEDULES[prediction]
  if (prediction, weighting) == ("epsilon", "picture"):
    with pytest.raises(errors.ConfigError, match="no bound"):
      denoising.loss_weights(schedule, weighting, _A)
    return
  x, noise, z, off = _case()
  output = _output(prediction, x, noise, z) + 0.3 * off
  own = denoising.output_error(schedule, output, x, noise, _A)
  weights = denoising.loss_weights(schedule, weighting, jnp.asarray(_A), 5.0)
  eps = schedules.to_eps(schedule, output, z, _A)
  of_eps = np.square(eps - noise).mean((1, 2, 3))
  expected = _FACTORS[weighting](_A / (1 - _A)) * of_eps
  np.testing.assert_allclose(weights * own, expected, rtol=2e-3)


def test_weighting_output_leaves_the_error_unchanged():
  weights = denoising.loss_weights(_SCHEDULES["velocity"], "output", _A)
  np.testing.assert_array_equal(weights, 1)


@pytest.mark.parametrize("weighting", ["none", "min_snr", "picture", "output"])
@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_weights_are_finite_for_pure_noise(prediction, weighting):
  made = denoising.loss_weights(_SCHEDULES[prediction], weighting, np.zeros(1))
  assert np.isfinite(made).all()


def test_bad_weightings_and_schedules_are_refused():
  schedule = _SCHEDULES["epsilon"]
  with pytest.raises(errors.ConfigError, match="expected one of"):
    denoising.check(schedule, {"weighting": "snr"})
  ends = dataclasses.replace(schedule, zero_snr=True)
  with pytest.raises(errors.ConfigError, match="pure noise"):
    denoising.check(ends, {"weighting": "none"})


def test_stratified_steps_visit_every_stratum_once():
  made = denoising.stratified_steps(
    _SCHEDULES["epsilon"], 10, jax.random.key(0)
  )
  assert sorted(np.asarray(made) // 100) == list(range(10))
  assert list(made) != sorted(made)


def _loss(phase, predict=None, valid=np.ones(4, np.float32), seed=0):
  """Computes the loss of four images, conditioned on their constant value."""
  value = jnp.arange(4.0)
  x = jnp.broadcast_to(value[:, None, None, None], (4, 2, 2, 1))
  asked = []

  def remember(z, t, told, drop):
    asked.append((z, t, told, drop))
    return jnp.zeros_like(z) if predict is None else predict(z, t, told, drop)

  loss, metrics = denoising.eps_loss(
    remember,
    _SCHEDULES["epsilon"],
    x,
    {"value": value},
    jnp.asarray(valid),
    jax.random.key(seed),
    _PHASE | phase,
  )
  return loss, metrics, asked[0]


def test_a_network_that_knows_the_image_has_no_loss():
  """Its input must be the noisy version of the image it is conditioned on."""
  table = jnp.asarray(schedules.alphas_cumprod(_SCHEDULES["epsilon"]))

  def right(z, t, told, drop):
    a = table[t].reshape(-1, 1, 1, 1)
    x = told["value"].reshape(-1, 1, 1, 1)
    return (z - jnp.sqrt(a) * x) / jnp.sqrt(1 - a)

  loss, metrics, _ = _loss({"draws": 3}, right)
  assert loss < 1e-6
  assert metrics["eps_mse"].compute() < 1e-6


def test_draws_are_independent_noisy_versions_of_each_image():
  _, _, (z, t, told, _) = _loss({"draws": 3})
  assert told["value"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
  assert len(set(t.tolist())) == 12
  assert len(np.unique(np.asarray(z))) == z.size


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_conditions_are_dropped_at_the_configured_rate(rate, expected):
  drop = _loss({"condition_dropout": rate})[2][3]
  assert np.asarray(drop).mean() == expected
  some = _loss({"condition_dropout": 0.3, "draws": 500})[2][3]
  np.testing.assert_allclose(np.asarray(some).mean(), 0.3, atol=0.04)


def test_images_without_weight_do_not_count():
  valid = np.array([1, 1, 0, 1], np.float32)
  spoil = lambda z, t, told, drop: (
    jnp.where((told["value"] == 2)[:, None, None, None], 1e3, 0.0)
    * jnp.ones_like(z)
  )
  assert _loss({}, spoil, valid)[0] == _loss({}, None, valid)[0]
  assert _loss({}, spoil)[0] > 1e4
  assert _loss({}, None, np.zeros(4, np.float32))[0] == 0


def test_the_moving_average_starts_at_the_weights_and_follows_slowly():
  params = {"w": jnp.ones(3)}
  state = denoising.start_ema(params)
  np.testing.assert_array_equal(state["ema"]["w"], 1)
  for _ in range(5):
    state = denoising.update_ema(state, {"w": jnp.zeros(3)}, 0.9)
  assert 0 < float(state["ema"]["w"][0]) < 1
  assert int(state["updates"]) == 5
