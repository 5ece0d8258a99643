"""Noise schedules: levels, visited steps, and what an output stands for."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.diffusion import schedules

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "ddim_small.npz"
SHORT = dataclasses.replace(schedules.PIXELS, num_steps=40)


@pytest.mark.parametrize("scheduler", ["sd", "sdxl"])
def test_alphas_are_those_of_the_official_scheduler(scheduler):
  golden = np.load(GOLDEN)[f"out_alphas_cumprod_{scheduler}"]
  ours = schedules.alphas_cumprod(schedules.STABLE_DIFFUSION)
  np.testing.assert_allclose(ours, golden, rtol=1e-5)


@pytest.mark.parametrize("count", [5, 10, 25, 30, 50])
def test_timesteps_are_those_of_the_official_scheduler(count):
  golden = np.load(GOLDEN)[f"out_timesteps_{count}_sd"]
  ours = schedules.timesteps(schedules.STABLE_DIFFUSION, count)
  np.testing.assert_array_equal(ours, golden)


@pytest.mark.parametrize("kind", schedules.KINDS)
@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_noise_only_grows_with_the_step(kind, shift):
  schedule = schedules.NoiseSchedule(kind=kind, shift=shift)
  alphas = schedules.alphas_cumprod(schedule)
  assert alphas.shape == (1000,)
  assert alphas.dtype == np.float32
  assert (np.diff(alphas) < 0).all()
  assert 0.99 < alphas[0] < 1 or kind != "scaled_linear"
  assert 0 < alphas[-1] < 0.05


def test_a_negative_shift_is_noisier():
  plain = schedules.alphas_cumprod(schedules.NoiseSchedule(kind="cosine"))
  noisy = schedules.alphas_cumprod(
    schedules.NoiseSchedule(kind="cosine", shift=-1.0)
  )
  assert (noisy[10:-10] < plain[10:-10]).all()


def test_zero_snr_ends_in_pure_noise_and_keeps_the_first_step():
  plain = schedules.alphas_cumprod(schedules.STABLE_DIFFUSION)
  zero = schedules.alphas_cumprod(schedules.NoiseSchedule(zero_snr=True))
  assert zero[-1] == 0
  assert zero[0] == pytest.approx(plain[0], rel=1e-6)
  assert (zero[1:] < plain[1:]).all()


def test_betas_replace_a_kind():
  betas = np.linspace(0.00085**0.5, 0.012**0.5, 50) ** 2
  given = schedules.NoiseSchedule(
    num_steps=50, kind="linear", betas=tuple(betas)
  )
  made = schedules.NoiseSchedule(num_steps=50)
  np.testing.assert_array_equal(
    schedules.alphas_cumprod(given), schedules.alphas_cumprod(made)
  )


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_sampling_may_begin_at_the_noisiest_step(spacing):
  schedule = dataclasses.replace(schedules.PIXELS, spacing=spacing)
  steps = schedules.timesteps(schedule, 7)
  assert steps[0] == 999
  assert (np.diff(steps) < 0).all()


@pytest.mark.parametrize("spacing", schedules.SPACINGS)
def test_the_requested_number_of_steps_is_visited(spacing):
  schedule = schedules.NoiseSchedule(spacing=spacing)
  for count in range(1, 1001, 4):  # 61: 1000 / 61 * 61 rounds to above 1000
    steps = schedules.timesteps(schedule, count)
    assert steps.shape == (count,)
    assert 0 <= steps[-1] <= steps[0] < 1000


def test_too_many_steps_are_refused_with_their_number():
  with pytest.raises(ValueError, match="from 1 to 40"):
    schedules.timesteps(SHORT, 41)
  with pytest.raises(ValueError, match="from 1 to 40"):
    schedules.timesteps(SHORT, 0)


@pytest.mark.parametrize("prediction", schedules.PREDICTIONS)
def test_noise_and_image_are_recovered_from_a_perfect_output(prediction):
  schedule = schedules.NoiseSchedule(kind="cosine", prediction=prediction)
  x, eps = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 3))
  t = jnp.array([10, 400, 800])
  z = schedules.add_noise(schedule, x, eps, t)
  a = jnp.asarray(schedules.alphas_cumprod(schedule))[t]
  root, rest = (v[:, None, None, None] for v in (a**0.5, (1 - a) ** 0.5))
  outputs = {"epsilon": eps, "velocity": root * eps - rest * x, "sample": x}
  perfect = outputs[prediction]
  ours = schedules.to_eps(schedule, perfect, z, a)
  # (z - sqrt(a) x) / sqrt(1 - a) divides a rounding error by 0.02 at t = 10.
  atol = 1e-4 if prediction == "sample" else 1e-5
  np.testing.assert_allclose(ours, eps, atol=atol)
  ours = schedules.to_image(schedule, perfect, z, a)
  np.testing.assert_allclose(ours, x, atol=1e-4)


@pytest.mark.parametrize("prediction", schedules.PREDICTIONS)
def test_eps_error_is_that_of_the_predicted_noise(prediction):
  schedule = schedules.NoiseSchedule(kind="cosine", prediction=prediction)
  x, eps, output = jax.random.normal(jax.random.key(0), (3, 4, 5, 5, 3))
  t = jnp.array([10, 300, 500, 800])
  a = jnp.asarray(schedules.alphas_cumprod(schedule))[t]
  z = schedules.add_noise(schedule, x, eps, t)
  guess = schedules.to_eps(schedule, output, z, a)
  wanted = jnp.square(guess - eps).mean((1, 2, 3))
  ours = schedules.eps_error(schedule, output, x, eps, a)
  np.testing.assert_allclose(ours, wanted, rtol=1e-4)


def test_a_number_clips_all_images_alike():
  schedule = schedules.NoiseSchedule(clip=0.5)
  ours = schedules.bound(schedule, jnp.array([[-2.0, 0.25], [0.75, 1.0]]))
  np.testing.assert_array_equal(ours, [[-0.5, 0.25], [0.5, 0.5]])


def test_dynamic_thresholding_divides_each_image_by_a_bound_of_its_own():
  schedule = schedules.NoiseSchedule(clip=(0.5, 3.0))
  images = jnp.array([[-2.0, 1.0, 4.0], [0.1, 0.2, -0.3], [9.0, -8.0, 7.0]])
  # Medians 2, 0.2 (raised to 1) and 8 (lowered to 3).
  wanted = [[-1.0, 0.5, 1.0], [0.1, 0.2, -0.3], [1.0, -1.0, 1.0]]
  ours = schedules.bound(schedule, images)
  np.testing.assert_allclose(ours, wanted, rtol=1e-6)


def test_a_schedule_survives_json():
  schedule = schedules.NoiseSchedule(
    num_steps=3, betas=(0.1, 0.2, 0.3), clip=(0.9, 2.0), zero_snr=True
  )
  text = json.dumps(dataclasses.asdict(schedule))
  assert schedules.NoiseSchedule(**json.loads(text)) == schedule
  assert hash(schedules.NoiseSchedule(**json.loads(text))) == hash(schedule)


def test_an_unknown_kind_names_the_known_ones():
  with pytest.raises(ValueError, match="linear, scaled_linear, cosine"):
    schedules.NoiseSchedule(kind="sigmoid")


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"num_steps": 0}, "num_steps"),
    ({"steps_offset": -1}, "steps_offset"),
    ({"beta_end": 1.0}, "betas"),
    ({"clip": 0.0}, "clip"),
    ({"clip": (1.5, 1.0)}, "clip"),
    ({"num_steps": 3, "betas": (0.1, 0.2)}, "2 betas for 3 steps"),
  ],
)
def test_a_number_out_of_range_is_an_error_that_names_it(fields, named):
  with pytest.raises(ValueError, match=named):
    schedules.NoiseSchedule(**fields)
