"""Schedules and DDIM sampling."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.infer import diffusion

_GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "ddim_small.npz"
_SHORT = dataclasses.replace(
  diffusion.PIXELS, num_steps=40, prediction="velocity"
)


def _linear_denoise(z, t, condition):
  """Stands for a network: cheap, and uses all it is given."""
  shift, scale = condition
  wave = jnp.sin(t.astype(jnp.float32))[:, None, None]
  return 0.3 * z * scale[:, None, None] + shift[:, None, None] + 0.1 * wave


def _condition(n):
  return jnp.linspace(-0.2, 0.3, n), jnp.linspace(0.5, 1.0, n)


def _sample(schedule=_SHORT, n=3, **kwargs):
  settings = {"seeds": jnp.arange(n), "shape": (4, 5), "steps": 7} | kwargs
  return diffusion.sample(_linear_denoise, schedule, _condition(n), **settings)


@pytest.mark.parametrize("scheduler", ["sd", "sdxl"])
def test_alphas_are_those_of_the_official_scheduler(scheduler):
  golden = np.load(_GOLDEN)[f"out_alphas_cumprod_{scheduler}"]
  ours = diffusion.alphas_cumprod(diffusion.STABLE_DIFFUSION)
  np.testing.assert_allclose(ours, golden, rtol=1e-4)


@pytest.mark.parametrize("count", [5, 10, 25, 30, 50])
def test_timesteps_are_those_of_the_official_scheduler(count):
  golden = np.load(_GOLDEN)[f"out_timesteps_{count}_sd"]
  ours = diffusion.timesteps(diffusion.STABLE_DIFFUSION, count)
  np.testing.assert_array_equal(ours, golden)


@pytest.mark.parametrize("scheduler", ["sd", "sdxl"])
def test_sampling_follows_the_official_trajectory(scheduler):
  golden = np.load(_GOLDEN)
  schedule = diffusion.STABLE_DIFFUSION
  visited = diffusion.timesteps(schedule, 10)
  before, after = diffusion.levels(schedule, visited)
  z = jnp.asarray(golden["in_latents"])
  for i in range(10):
    z, picture = diffusion.ddim_step(
      schedule, golden["in_eps"][i], z, before[i], after[i]
    )
    for ours, name in ((z, "trajectory"), (picture, "x0")):
      theirs = golden[f"out_{name}_{scheduler}"][i]
      error = np.abs(ours - theirs).max() / np.abs(theirs).max()
      assert error <= 1e-4, (name, i)

  def recorded(z, t, eps):
    return eps[:, jnp.searchsorted(-visited, -t[0])]

  whole = diffusion.sample(
    recorded,
    schedule,
    jnp.asarray(golden["in_eps"]).swapaxes(0, 1),
    seeds=jnp.zeros(1, jnp.int32),
    shape=(4, 4, 4),
    steps=10,
    noise=jnp.asarray(golden["in_latents"]),
  )
  theirs = golden[f"out_trajectory_{scheduler}"][-1]
  assert np.abs(whole - theirs).max() / np.abs(theirs).max() <= 1e-4


@pytest.mark.parametrize("kind", diffusion.KINDS)
@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_noise_only_grows_with_the_step(kind, shift):
  schedule = diffusion.Schedule(kind=kind, shift=shift)
  alphas = diffusion.alphas_cumprod(schedule)
  assert alphas.shape == (1000,)
  assert alphas.dtype == np.float32
  assert (np.diff(alphas) < 0).all()
  assert 0.99 < alphas[0] < 1 or kind != "scaled_linear"
  assert 0 < alphas[-1] < 0.05


def test_a_negative_shift_is_noisier():
  plain = diffusion.alphas_cumprod(diffusion.Schedule(kind="cosine"))
  noisy = diffusion.alphas_cumprod(
    diffusion.Schedule(kind="cosine", shift=-1.0)
  )
  assert (noisy[10:-10] < plain[10:-10]).all()


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_sampling_may_begin_at_the_noisiest_step(spacing):
  schedule = dataclasses.replace(diffusion.PIXELS, spacing=spacing)
  steps = diffusion.timesteps(schedule, 7)
  assert steps[0] == 999
  assert (np.diff(steps) < 0).all()


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_noise_and_picture_are_recovered_from_a_perfect_output(prediction):
  schedule = diffusion.Schedule(kind="cosine", prediction=prediction)
  x, eps = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 3))
  t = jnp.array([10, 400, 800])
  z = diffusion.add_noise(schedule, x, eps, t)
  a = jnp.asarray(diffusion.alphas_cumprod(schedule))[t]
  root, rest = (v[:, None, None, None] for v in (a**0.5, (1 - a) ** 0.5))
  outputs = {"epsilon": eps, "velocity": root * eps - rest * x, "sample": x}
  perfect = outputs[prediction]
  ours = diffusion.to_eps(schedule, perfect, z, a)
  # (z - sqrt(a) x) / sqrt(1 - a) divides a rounding error by 0.02 at t = 10.
  atol = 1e-4 if prediction == "sample" else 1e-5
  np.testing.assert_allclose(ours, eps, atol=atol)
  ours = diffusion.to_picture(schedule, perfect, z, a)
  np.testing.assert_allclose(ours, x, atol=1e-4)


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_eps_error_is_that_of_the_predicted_noise(prediction):
  schedule = diffusion.Schedule(kind="cosine", prediction=prediction)
  x, eps, output = jax.random.normal(jax.random.key(0), (3, 4, 5, 5, 3))
  t = jnp.array([10, 300, 500, 800])
  a = jnp.asarray(diffusion.alphas_cumprod(schedule))[t]
  z = diffusion.add_noise(schedule, x, eps, t)
  guess = diffusion.to_eps(schedule, output, z, a)
  wanted = jnp.square(guess - eps).mean((1, 2, 3))
  ours = diffusion.eps_error(schedule, output, x, eps, a)
  np.testing.assert_allclose(ours, wanted, rtol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_sampling_equals_a_plain_loop(eta):
  seeds = jnp.array([5, 6, 7])
  ours = _sample(eta=eta, seeds=seeds)
  schedule, table = _SHORT, diffusion.alphas_cumprod(_SHORT)
  steps = diffusion.timesteps(schedule, 7)
  noise = [diffusion.picture_noise(seeds, i, (4, 5)) for i in range(8)]
  z = np.asarray(noise[0])
  for i, t in enumerate(steps):
    a = float(table[t])
    b = float(table[steps[i + 1]]) if i < 6 else 1.0
    v = np.asarray(_linear_denoise(z, jnp.full(3, t), _condition(3)))
    x = np.clip(a**0.5 * z - (1 - a) ** 0.5 * v, -1, 1)
    eps = (z - a**0.5 * x) / (1 - a) ** 0.5
    s = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
    z = b**0.5 * x + max(1 - b - s**2, 0) ** 0.5 * eps + s * noise[i + 1]
  np.testing.assert_allclose(ours, z, atol=2e-5)


def test_guidance_one_equals_the_conditional_stream_alone():
  alone = _sample()
  other = jax.tree.map(lambda x: x + 1.0, _condition(3))
  one = _sample(uncondition=other, guidance=1.0)
  two = _sample(uncondition=other, guidance=2.0)
  np.testing.assert_allclose(one, alone, atol=1e-5)
  assert np.abs(two - alone).max() > 0.05


def test_guidance_zero_equals_the_unconditional_stream_alone():
  ours = _sample(uncondition=_condition(3), guidance=3.0)
  np.testing.assert_allclose(ours, _sample(), atol=1e-5)
  flipped = jax.tree.map(jnp.flip, _condition(3))
  zero = _sample(uncondition=flipped, guidance=0.0)
  alone = diffusion.sample(
    _linear_denoise, _SHORT, flipped, seeds=jnp.arange(3), shape=(4, 5), steps=7
  )
  np.testing.assert_allclose(zero, alone, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_seed_gives_its_picture_whatever_the_batch(eta):
  together = _sample(seeds=jnp.array([4, 9, 2]), eta=eta)
  condition = jax.tree.map(lambda x: x[1:2], _condition(3))
  alone = diffusion.sample(
    _linear_denoise,
    _SHORT,
    condition,
    seeds=jnp.array([9]),
    shape=(4, 5),
    steps=7,
    eta=eta,
  )
  np.testing.assert_allclose(together[1], alone[0], atol=1e-6)
  assert np.abs(together[0] - together[1]).max() > 0.1


def test_clip_bounds_the_predicted_picture():
  wild = jnp.full((1, 2, 2), 50.0)
  z = jnp.ones((1, 2, 2))
  _, clipped = diffusion.ddim_step(_SHORT, wild, z, 0.5, 0.7)
  assert np.abs(clipped).max() == 1.0
  free = dataclasses.replace(_SHORT, clip=None)
  _, picture = diffusion.ddim_step(free, wild, z, 0.5, 0.7)
  assert np.abs(picture).max() > 10


def test_too_many_steps_say_how_many_there_are():
  with pytest.raises(ValueError, match="from 1 to 40"):
    diffusion.timesteps(_SHORT, 41)
  with pytest.raises(ValueError, match="from 1 to 40"):
    diffusion.timesteps(_SHORT, 0)


def test_an_unknown_kind_names_the_known_ones():
  with pytest.raises(ValueError, match="linear, scaled_linear, cosine"):
    diffusion.Schedule(kind="sigmoid")
