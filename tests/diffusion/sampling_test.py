"""Sampling: seeds, guidance, the scan."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.diffusion import sampling, schedules, solvers

_SHORT = dataclasses.replace(
  schedules.PIXELS, num_steps=40, prediction="velocity"
)
_SOLVERS = [solvers.Ddim(), solvers.Ddim(eta=1.0), solvers.DpmSolver()]


def _linear_denoise(z, t, condition):
  """Stands in for a network: cheap, and uses all its inputs."""
  shift, scale = condition
  wave = jnp.sin(t.astype(jnp.float32))[:, None, None]
  return 0.3 * z * scale[:, None, None] + shift[:, None, None] + 0.1 * wave


def _condition(n):
  return jnp.linspace(-0.2, 0.3, n), jnp.linspace(0.5, 1.0, n)


def _sample(schedule=_SHORT, n=3, denoise=_linear_denoise, **kwargs):
  settings = {"seeds": jnp.arange(n), "shape": (4, 5), "steps": 7} | kwargs
  return sampling.sample(denoise, schedule, _condition(n), **settings)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_sampling_equals_a_plain_loop(eta):
  seeds = jnp.array([5, 6, 7])
  ours = _sample(solver=solvers.Ddim(eta=eta), seeds=seeds)
  schedule, table = _SHORT, schedules.alphas_cumprod(_SHORT)
  steps = schedules.timesteps(schedule, 7)
  noise = [sampling.image_noise(seeds, i, (4, 5)) for i in range(8)]
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


def test_a_solver_gets_the_image_of_the_previous_step():
  solver = solvers.DpmSolver()
  visited, numbers = solver.plan(_SHORT, 7)
  z = sampling.image_noise(jnp.arange(3), 0, (4, 5))
  image = jnp.zeros_like(z)
  for i, t in enumerate(visited):
    output = _linear_denoise(z, jnp.full(3, t), _condition(3))
    now = {name: values[i] for name, values in numbers.items()}
    z, image = solver.step(_SHORT, output, z, image, now)
  np.testing.assert_allclose(_sample(solver=solver), z, atol=1e-5)


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
  alone = sampling.sample(
    _linear_denoise, _SHORT, flipped, seeds=jnp.arange(3), shape=(4, 5), steps=7
  )
  np.testing.assert_allclose(zero, alone, atol=1e-5)


@pytest.mark.parametrize("solver", _SOLVERS)
def test_an_image_depends_on_its_seed_not_on_its_batch(solver):
  together = _sample(seeds=jnp.array([4, 9, 2]), solver=solver)
  condition = jax.tree.map(lambda x: x[1:2], _condition(3))
  alone = sampling.sample(
    _linear_denoise,
    _SHORT,
    condition,
    seeds=jnp.array([9]),
    shape=(4, 5),
    steps=7,
    solver=solver,
  )
  np.testing.assert_allclose(together[1], alone[0], atol=1e-6)
  assert np.abs(together[0] - together[1]).max() > 0.1


def test_noise_as_an_argument_replaces_that_of_the_seeds():
  noise = jax.random.normal(jax.random.key(3), (3, 4, 5))
  ours = _sample(noise=noise)
  np.testing.assert_array_equal(ours, _sample(noise=noise, seeds=[7, 8, 9]))
  assert np.abs(ours - _sample()).max() > 0.1
  own = sampling.image_noise(jnp.arange(3), 0, (4, 5))
  np.testing.assert_array_equal(_sample(noise=own), _sample())


def test_noise_of_another_shape_is_refused():
  with pytest.raises(ValueError, match=r"need \(3, 4, 5\)"):
    _sample(noise=jnp.zeros((1, 4, 5)))


@pytest.mark.parametrize("solver", _SOLVERS)
def test_both_streams_of_all_steps_are_one_scan_over_one_batch(solver):
  batches = []

  def denoise(z, t, condition):
    batches.append(z.shape[0])
    return _linear_denoise(z, t, condition)

  def draw(guidance, seeds):
    return _sample(
      denoise=denoise,
      seeds=seeds,
      uncondition=_condition(3),
      guidance=guidance,
      solver=solver,
    )

  jaxpr = jax.make_jaxpr(draw)(2.0, jnp.arange(3))
  scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
  assert [e.params["length"] for e in scans] == [7]
  assert set(batches) == {6}
  draw, count = jax.jit(draw), len(batches)
  draw(2.0, jnp.arange(3))
  count = len(batches)
  draw(3.0, jnp.arange(3) + 5)
  assert len(batches) == count  # another factor, other seeds: no new trace


@pytest.mark.parametrize("solver", _SOLVERS)
def test_one_program_takes_any_number_of_steps(solver):
  told = []

  @jax.jit
  def draw(steps):
    told.append("traced")
    progress = lambda *at: told.append(at)
    return _sample(steps=steps, solver=solver, progress=progress)

  for count in (7, 2, 40 if solver.eta == 0 else 39):
    drawn = draw(sampling.planned(solver, _SHORT, count))
    jax.effects_barrier()
    assert told[-1] == (count, count)
    expected = _sample(steps=count, solver=solver)
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
  assert told.count("traced") == 1
  with pytest.raises(ValueError, match="from 1 to 40"):
    sampling.planned(solver, _SHORT, 41)


def test_progress_is_reported_after_each_step_in_order():
  told = []
  draw = jax.jit(lambda: _sample(progress=lambda *at: told.append(at)))
  quiet = _sample()
  ours = draw()
  jax.effects_barrier()
  assert told == [(i, 7) for i in range(1, 8)]
  np.testing.assert_allclose(ours, quiet, atol=1e-6)
  draw()
  jax.effects_barrier()
  assert len(told) == 14


def test_a_network_in_bfloat16_leaves_the_latents_in_float32():
  seen = []

  def denoise(z, t, condition):
    seen.append(z.dtype)
    return _linear_denoise(z, t, condition).astype(jnp.bfloat16)

  ours = _sample(denoise=denoise, dtype=jnp.bfloat16)
  assert set(seen) == {jnp.dtype(jnp.bfloat16)}
  assert ours.dtype == jnp.float32
  assert (ours.astype(jnp.bfloat16).astype(jnp.float32) != ours).any()
  assert 0 < np.abs(ours - _sample()).max() < 0.05


def test_bfloat16_rounds_the_input_of_the_network_and_nothing_else():
  def blind(z, t, _):
    return jnp.full_like(z, 0.25)

  ours = _sample(denoise=blind, dtype=jnp.bfloat16)
  np.testing.assert_array_equal(ours, _sample(denoise=blind))
