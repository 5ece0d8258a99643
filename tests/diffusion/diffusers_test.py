"""Whole trajectories of both solvers, beside those of diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.diffusion import schedules, solvers
from lavit_jax.port.diffusers import scheduler_config

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

_STABLE_DIFFUSION = {
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "clip_sample": False,
  "set_alpha_to_one": False,
  "steps_offset": 1,
  "timestep_spacing": "leading",
}
_CHANGES = {
  "stable_diffusion": {},
  "trailing": {"timestep_spacing": "trailing"},
  "linspace": {"timestep_spacing": "linspace", "set_alpha_to_one": True},
  "velocity": {"prediction_type": "v_prediction"},
  "picture": {"prediction_type": "sample", "timestep_spacing": "trailing"},
  "clip": {"clip_sample": True, "clip_sample_range": 0.8},
  "thresholding": {
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.9,
    "sample_max_value": 1.5,
  },
  "linear": {"beta_schedule": "linear", "beta_end": 0.02, "steps_offset": 0},
  "cosine": {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
  },
  "zero_snr": {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
  },
  "trained_betas": {
    "trained_betas": np.linspace(0.0001, 0.03, 200).tolist(),
    "num_train_timesteps": 200,
  },
}
_NOISE = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)


def _toy(z, t, lib):
  """Stands for a network, and is bounded."""
  return 0.6 * lib.sin(1.3 * z) + 0.2 * z + 0.1 * lib.cos(t)


def _ours(schedule, solver, count, extra=None):
  visited, numbers = solver.plan(schedule, count)
  extra = np.zeros((count, *_NOISE.shape)) if extra is None else extra

  def step(carry, now):
    z, previous = carry
    t, more, now = now
    output = _toy(z, t.astype(jnp.float32), jnp)
    return (solver.step(schedule, output, z, previous, now, more),) * 2

  start = (jnp.asarray(_NOISE), jnp.zeros_like(_NOISE))
  _, path = jax.lax.scan(step, start, (visited, extra, numbers))
  return visited, np.asarray(path[0])


def _theirs(scheduler, count, **kwargs):
  scheduler.set_timesteps(count)
  z, path = torch.tensor(_NOISE), []
  for i, t in enumerate(scheduler.timesteps):
    output = _toy(z, t.float(), torch)
    given = {k: v[i] if k == "variance_noise" else v for k, v in kwargs.items()}
    z = scheduler.step(output, t, z, **given).prev_sample
    path.append(z.numpy())
  return scheduler.timesteps.numpy(), np.stack(path)


def _assert_equal(ours, theirs):
  np.testing.assert_array_equal(ours[0], theirs[0])
  error = np.abs(ours[1] - theirs[1]).max() / np.abs(theirs[1]).max()
  assert error <= 1e-5


def _judge(kind, name, **kwargs):
  """Their scheduler with the settings of a name, and our schedule."""
  fields = _STABLE_DIFFUSION | _CHANGES[name]
  own = dict(fields)
  if kind is diffusers.DPMSolverMultistepScheduler:  # it has no such fields
    foreign = ("clip_sample", "clip_sample_range", "set_alpha_to_one")
    own = {k: v for k, v in fields.items() if k not in foreign}
  return kind(**own, **kwargs), scheduler_config.parse(fields)


# 7 divides no number of steps here, 20 does; from 15 on rules change.
@pytest.mark.parametrize("count", [7, 20])
@pytest.mark.parametrize("name", _CHANGES)
def test_ddim_steps_as_diffusers_does(name, count):
  scheduler, schedule = _judge(diffusers.DDIMScheduler, name)
  ours = _ours(schedule, solvers.OFFICIAL, count)
  _assert_equal(ours, _theirs(scheduler, count))


@pytest.mark.parametrize("name", ["stable_diffusion", "velocity", "clip"])
def test_noisy_ddim_steps_as_diffusers_does(name):
  extra = np.random.default_rng(1).normal(size=(7, *_NOISE.shape))
  extra = extra.astype(np.float32)
  scheduler, schedule = _judge(diffusers.DDIMScheduler, name)
  ours = _ours(schedule, solvers.Ddim(eta=0.6, official=True), 7, extra)
  _assert_equal(
    ours, _theirs(scheduler, 7, eta=0.6, variance_noise=torch.tensor(extra))
  )


@pytest.mark.parametrize("count", [7, 20])
@pytest.mark.parametrize("name", _CHANGES)
def test_dpm_solver_steps_as_diffusers_does(name, count):
  kind = diffusers.DPMSolverMultistepScheduler
  scheduler, schedule = _judge(kind, name)
  solver = solvers.named("dpm++")
  _assert_equal(_ours(schedule, solver, count), _theirs(scheduler, count))


@pytest.mark.parametrize("count", [7, 20])
@pytest.mark.parametrize("lower", [True, False])
def test_dpm_solver_may_end_at_the_lowest_noise_level(lower, count):
  scheduler, schedule = _judge(
    diffusers.DPMSolverMultistepScheduler,
    "stable_diffusion",
    final_sigmas_type="sigma_min",
    lower_order_final=lower,
  )
  solver = solvers.DpmSolver(to_zero=False, lower_order_final=lower)
  _assert_equal(_ours(schedule, solver, count), _theirs(scheduler, count))


@pytest.mark.parametrize("name", _CHANGES)
def test_diffusers_reads_the_written_scheduler_as_the_same_one(name):
  scheduler, schedule = _judge(diffusers.DDIMScheduler, name)
  written = scheduler_config.unparse(schedule)
  again = diffusers.DDIMScheduler.from_config(written)
  assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
  named = {k: v for k, v in again.config.items() if not k.startswith("_")}
  theirs = {k: scheduler.config[k] for k in named}
  assert named == theirs
  assert scheduler_config.parse(written) == schedule


@pytest.mark.parametrize(
  "fields",
  [
    {
      "_class_name": "PNDMScheduler",
      "_diffusers_version": "0.6.0",
      "beta_end": 0.012,
      "beta_schedule": "scaled_linear",
      "beta_start": 0.00085,
      "num_train_timesteps": 1000,
      "set_alpha_to_one": False,
      "skip_prk_steps": True,
      "steps_offset": 1,
      "trained_betas": None,
      "clip_sample": False,
    },
    {
      "_class_name": "EulerDiscreteScheduler",
      "beta_end": 0.012,
      "beta_schedule": "scaled_linear",
      "beta_start": 0.00085,
      "clip_sample": False,
      "interpolation_type": "linear",
      "num_train_timesteps": 1000,
      "prediction_type": "epsilon",
      "sample_max_value": 1.0,
      "set_alpha_to_one": False,
      "skip_prk_steps": True,
      "steps_offset": 1,
      "timestep_spacing": "leading",
      "trained_betas": None,
      "use_karras_sigmas": False,
    },
    {"_class_name": "PNDMScheduler"},
    {
      "_class_name": "DPMSolverMultistepScheduler",
      "beta_schedule": "squaredcos_cap_v2",
      "solver_order": 2,
      "timestep_spacing": "linspace",
      "steps_offset": 1,
      "_use_default_values": ["timestep_spacing", "steps_offset"],
    },
  ],
)
def test_the_file_of_another_scheduler_is_the_same_ddim(fields):
  scheduler = diffusers.DDIMScheduler.from_config(fields)
  schedule = scheduler_config.parse(fields)
  np.testing.assert_allclose(
    schedules.alphas_cumprod(schedule),
    scheduler.alphas_cumprod.numpy(),
    rtol=1e-5,
    atol=1e-9,  # where 1 - 0.999 in float32 has few digits
  )
  _assert_equal(_ours(schedule, solvers.OFFICIAL, 7), _theirs(scheduler, 7))


def test_the_loadable_schedulers_are_those_diffusers_calls_compatible():
  theirs = {c.__name__ for c in diffusers.DDIMScheduler().compatibles}
  # Its levels are no betas.
  assert set(scheduler_config.CLASSES) == theirs - {"EDMEulerScheduler"}
