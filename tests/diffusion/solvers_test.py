"""Solvers: DDIM and DPM-Solver++ against recordings and closed forms."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.diffusion import sampling, schedules, solvers

_GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "ddim_small.npz"
_SHORT = dataclasses.replace(schedules.PIXELS, num_steps=40)
_DPM = solvers.DpmSolver()


def _error(ours, theirs):
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("scheduler", ["sd", "sdxl"])
def test_ddim_follows_the_official_trajectory(scheduler, official):
  golden = np.load(_GOLDEN)
  schedule, solver = (
    schedules.STABLE_DIFFUSION,
    solvers.Ddim(official=official),
  )
  _, numbers = solver.plan(schedule, 10)
  z = jnp.asarray(golden["in_latents"])
  for i in range(10):
    now = {name: values[i] for name, values in numbers.items()}
    z, image = solver.step(schedule, golden["in_eps"][i], z, None, now)
    for ours, name in ((z, "trajectory"), (image, "x0")):
      assert _error(ours, golden[f"out_{name}_{scheduler}"][i]) <= 1e-4


def _flow_error(solver, schedule, steps, spread=0.5):
  """How far from the true flow, where images are noise of a given spread.

  The perfect network is then linear, and the flow only scales z by the spread
  of what there is at each level.
  """
  visited, numbers = solver.plan(schedule, steps)
  a = schedules.alphas_cumprod(schedule)[visited]
  exact = np.sqrt(a * spread**2 + 1 - a)
  z, image, worst = jnp.full((1, 1), exact[0]), jnp.zeros((1, 1)), 0.0
  # The last steps, where log a changes quickly, are too long for any order.
  for i in range(np.sum(visited >= 200) - 1):
    eps = np.sqrt(1 - a[i]) * z / exact[i] ** 2
    now = {name: values[i] for name, values in numbers.items()}
    z, image = solver.step(schedule, eps, z, image, now)
    worst = max(worst, float(jnp.abs(z - exact[i + 1]).max()))
  return worst


@pytest.mark.parametrize("spacing", schedules.SPACINGS)
def test_dpm_solver_is_of_second_order_and_ddim_of_first(spacing):
  schedule = schedules.NoiseSchedule(spacing=spacing)
  dpm = [_flow_error(_DPM, schedule, n) for n in (10, 20, 40)]
  ddim = [_flow_error(solvers.Ddim(), schedule, n) for n in (10, 20, 40)]
  assert dpm[0] < ddim[0] / 3
  assert dpm[2] < dpm[1] / 3 < dpm[0] / 9
  assert ddim[2] > ddim[1] / 3 > ddim[0] / 9


@pytest.mark.parametrize("solver", [solvers.Ddim(), _DPM])
def test_a_network_certain_of_an_image_samples_it(solver):
  ours = sampling.sample(
    lambda z, t, image: image,
    _SHORT,
    jnp.full((2, 3), 0.7),
    seeds=jnp.arange(2),
    shape=(3,),
    steps=6,
    solver=solver,
  )
  np.testing.assert_allclose(ours, 0.7, atol=1e-6)


def test_dpm_solver_steps_by_first_order_at_both_ends():
  schedule = schedules.STABLE_DIFFUSION
  _, few = _DPM.plan(schedule, 8)
  assert few["old"][0] == few["old"][-1] == 0
  assert (few["old"][1:-1] > 0).all()
  kept = solvers.DpmSolver(to_zero=False)
  assert kept.plan(schedule, 8)[1]["old"][-1] == 0
  assert kept.plan(schedule, 20)[1]["old"][-1] > 0
  never = solvers.DpmSolver(to_zero=False, lower_order_final=False)
  assert never.plan(schedule, 8)[1]["old"][-1] > 0


def test_dpm_solver_may_take_another_spacing_than_the_schedules():
  steps, _ = solvers.DpmSolver(spacing="trailing").plan(
    schedules.NoiseSchedule(), 4
  )
  np.testing.assert_array_equal(steps, [999, 749, 499, 249])
  with pytest.raises(ValueError, match="leading, trailing, linspace"):
    solvers.DpmSolver(spacing="karras").plan(schedules.NoiseSchedule(), 4)


@pytest.mark.parametrize("solver", [solvers.Ddim(), solvers.OFFICIAL, _DPM])
def test_clip_bounds_the_predicted_image(solver):
  schedule = dataclasses.replace(_SHORT, prediction="velocity")
  wild, z = jnp.full((1, 2, 2), 50.0), jnp.ones((1, 2, 2))
  now = {k: v[1] for k, v in solver.plan(schedule, 5)[1].items()}
  _, clipped = solver.step(schedule, wild, z, z, now)
  assert np.abs(clipped).max() == 1.0
  free = dataclasses.replace(schedule, clip=None)
  _, image = solver.step(free, wild, z, z, now)
  assert np.abs(image).max() > 10


def test_clip_corrects_the_noise_unless_it_is_official():
  schedule = dataclasses.replace(_SHORT, prediction="epsilon")
  now = {"a": jnp.float32(0.36), "a_next": jnp.float32(0.64)}
  z, eps = jnp.full((1, 1), 4.0), jnp.full((1, 1), 2.0)
  ours, image = solvers.Ddim().step(schedule, eps, z, None, now)
  assert image == 1.0  # (4 - 0.8 * 2) / 0.6, clipped
  np.testing.assert_allclose(ours, 0.8 + 0.6 * (4 - 0.6) / 0.8, rtol=1e-6)
  theirs, _ = solvers.OFFICIAL.step(schedule, eps, z, None, now)
  np.testing.assert_allclose(theirs, 0.8 + 0.6 * 2, rtol=1e-6)


def test_a_schedule_from_pure_noise_refuses_predicted_noise():
  schedule = schedules.NoiseSchedule(zero_snr=True, spacing="trailing")
  with pytest.raises(ValueError, match="zero_snr"):
    solvers.Ddim().plan(schedule, 5)
  velocity = dataclasses.replace(schedule, prediction="velocity")
  assert solvers.Ddim().plan(velocity, 5)[1]["a"][0] == 0


@pytest.mark.parametrize("spacing", schedules.SPACINGS)
def test_dpm_solver_refuses_to_visit_a_step_twice(spacing):
  schedule = schedules.NoiseSchedule(num_steps=40, spacing=spacing)
  with pytest.raises(ValueError, match="from 1 to 40"):
    _DPM.plan(schedule, 41)
  if spacing == "leading":
    with pytest.raises(ValueError, match="40 steps of a schedule with 40"):
      _DPM.plan(schedule, 40)


def test_solvers_have_names():
  assert solvers.named("ddim", eta=0.5) == solvers.Ddim(eta=0.5, official=True)
  assert solvers.named("dpm++") == solvers.DpmSolver(official=True)
  assert solvers.named("ddim", official=False) == solvers.Ddim()
  with pytest.raises(
    ValueError, match="'euler' is unknown: give one of ddim, dpm\\+\\+"
  ):
    solvers.named("euler")
  with pytest.raises(ValueError, match=r"eta=0\.5"):
    solvers.named("dpm++", eta=0.5)
