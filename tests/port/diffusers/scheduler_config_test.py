"""Scheduler files: DDIM's rules for fields, and errors that name them."""

import inspect
import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.diffusion import schedules, solvers
from lavit_jax.port.diffusers import scheduler_config

_FIELDS = {
  "_class_name": "PNDMScheduler",
  "_diffusers_version": "0.6.0",
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "clip_sample": False,
  "num_train_timesteps": 1000,
  "set_alpha_to_one": False,
  "skip_prk_steps": True,
  "steps_offset": 1,
  "trained_betas": None,
}


def _parse(**changes):
  return scheduler_config.parse(_FIELDS | changes)


def test_the_file_of_stable_diffusion_is_the_constant():
  assert _parse() == schedules.STABLE_DIFFUSION
  assert _parse(_class_name="EulerDiscreteScheduler") == _parse()


def test_missing_fields_have_ddims_defaults():
  ours = scheduler_config.parse({})
  assert ours == schedules.NoiseSchedule(
    kind="linear",
    beta_start=0.0001,
    beta_end=0.02,
    steps_offset=0,
    alpha_to_one=True,
    clip=1.0,
  )
  assert _parse(_use_default_values=None, steps_offset=3).steps_offset == 3
  changed = _parse(_use_default_values=["steps_offset", "clip_sample"])
  assert changed.steps_offset == 0
  assert changed.clip == 1.0


def test_every_field_of_ddim_reaches_the_schedule():
  changes = {
    "num_train_timesteps": ({"num_train_timesteps": 500}, {"num_steps": 500}),
    "beta_schedule": (
      {"beta_schedule": "squaredcos_cap_v2"},
      {"kind": "squaredcos_cap_v2"},
    ),
    "beta_start": ({"beta_start": 0.001}, {"beta_start": 0.001}),
    "beta_end": ({"beta_end": 0.03}, {"beta_end": 0.03}),
    "trained_betas": (
      {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2},
      {"betas": (0.1, 0.2), "num_steps": 2},
    ),
    "clip_sample": ({"clip_sample": True}, {"clip": 1.0}),
    "clip_sample_range": (
      {"clip_sample": True, "clip_sample_range": 2},
      {"clip": 2.0},
    ),
    "set_alpha_to_one": ({"set_alpha_to_one": True}, {"alpha_to_one": True}),
    "steps_offset": ({"steps_offset": 3}, {"steps_offset": 3}),
    "prediction_type": (
      {"prediction_type": "v_prediction"},
      {"prediction": "velocity"},
    ),
    "timestep_spacing": (
      {"timestep_spacing": "trailing"},
      {"spacing": "trailing"},
    ),
    "thresholding": ({"thresholding": True}, {"clip": (0.995, 1.0)}),
    "dynamic_thresholding_ratio": (
      {"thresholding": True, "dynamic_thresholding_ratio": 0.9},
      {"clip": (0.9, 1.0)},
    ),
    "sample_max_value": (
      {"thresholding": True, "sample_max_value": 2.5, "clip_sample": True},
      {"clip": (0.995, 2.5)},
    ),
    "rescale_betas_zero_snr": (
      {"rescale_betas_zero_snr": True},
      {"zero_snr": True},
    ),
  }
  assert set(changes) == set(scheduler_config.DEFAULTS)
  for theirs, ours in changes.values():
    assert _parse(**theirs) == schedules.NoiseSchedule(**ours)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "'FlowMatchEuler"),
    ({"_class_name": None}, "names the scheduler None"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid': expected one of"),
    ({"prediction_type": "flow_prediction"}, "prediction_type='flow_pred"),
    ({"timestep_spacing": "karras"}, "timestep_spacing='karras'.*leading"),
    ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000'.*whole"),
    ({"steps_offset": 0.5}, "steps_offset=0.5.*whole number"),
    ({"set_alpha_to_one": 1}, "set_alpha_to_one=1.*true or false"),
    ({"beta_start": None}, "beta_start=None: expected a number"),
    ({"beta_end": float("nan")}, "beta_end=nan"),
    ({"trained_betas": 0.1}, "trained_betas=0.1.*list of numbers"),
    ({"trained_betas": [0.1, "x"]}, "trained_betas"),
    ({"trained_betas": [0.1, 0.2]}, "scheduler_config.json.*2 betas for 1000"),
    ({"beta_end": 1.5}, "schedule.betas"),
    ({"clip_sample": True, "clip_sample_range": -1}, "schedule.clip"),
    ({"beta_start": 10**400}, "beta_start=1000.*expected a number"),
    ({"steps_offset": 10**400}, "steps_offset=1000.*whole number"),
    ({"trained_betas": [10**400]}, "trained_betas"),
    ({"_use_default_values": 3}, "_use_default_values=3.*list of names"),
    ({"_use_default_values": "clip_sample"}, "list of names, or null"),
    ({"_use_default_values": [["beta_end"]]}, "list of names, or null"),
  ],
)
def test_a_wrong_value_is_an_error_that_names_it(changes, message):
  with pytest.raises(errors.CheckpointError, match=message):
    _parse(**changes)


def test_a_schedule_is_written_and_read_again():
  for changes in (
    {},
    {"kind": "linear", "clip": 0.5, "prediction": "velocity"},
    {"clip": (0.9, 2.0), "zero_snr": True, "spacing": "trailing"},
    {"num_steps": 2, "betas": (0.1, 0.2), "prediction": "sample"},
  ):
    schedule = schedules.NoiseSchedule(**changes)
    written = json.loads(json.dumps(scheduler_config.unparse(schedule)))
    assert scheduler_config.parse(written) == schedule
  with pytest.raises(errors.UsageError, match="'cosine'"):
    scheduler_config.unparse(schedules.PIXELS)


def test_a_folder_or_a_file_is_read(tmp_path):
  folder = tmp_path / "pixel_decoding" / "scheduler"
  with pytest.raises(
    errors.CheckpointError, match=r"decoding/scheduler/.*miss"
  ):
    scheduler_config.load(folder)
  folder.mkdir(parents=True)
  file = folder / scheduler_config.FILE
  file.write_text("[]")
  with pytest.raises(errors.CheckpointError, match="not a JSON object"):
    scheduler_config.load(folder)
  file.write_text(json.dumps(_FIELDS))
  assert (
    scheduler_config.load(folder) == scheduler_config.load(file) == _parse()
  )
  file.write_text(json.dumps(_FIELDS | {"clip_sample": "no"}))
  with pytest.raises(errors.CheckpointError, match=r"scheduler/.*clip_sample"):
    scheduler_config.load(folder)


@pytest.mark.shared
@pytest.mark.skipif(
  not os.environ.get("LAVIT_SHARED"),
  reason="needs LAVIT_SHARED, the folder with the recordings",
)
@pytest.mark.parametrize(
  ("folder", "scheduler"),
  [("pixel_decoding", "sd"), ("highres_pixel_decoding", "sdxl")],
)
def test_both_folders_give_the_recorded_trajectories(folder, scheduler):
  golden = pathlib.Path(os.environ["LAVIT_SHARED"]) / "golden" / "a"
  recorded = np.load(golden / "ddim.npz")
  schedule = scheduler_config.load(golden / "checkpoint" / folder / "scheduler")
  for count in (5, 10, 25, 30, 50):
    np.testing.assert_array_equal(
      schedules.timesteps(schedule, count),
      recorded[f"out_timesteps_{count}_{scheduler}"],
    )
  solver = solvers.OFFICIAL
  pairs = [(schedules.alphas_cumprod(schedule), f"alphas_cumprod_{scheduler}")]
  _, numbers = solver.plan(schedule, 10)
  z, path, images = jnp.asarray(recorded["in_latents"]), [], []
  for i, eps in enumerate(recorded["in_eps"]):
    now = {name: values[i] for name, values in numbers.items()}
    z, image = solver.step(schedule, eps, z, None, now)
    path.append(z)
    images.append(image)
  pairs += [
    (np.stack(path), f"trajectory_{scheduler}"),
    (np.stack(images), f"x0_{scheduler}"),
  ]
  for ours, name in pairs:
    theirs = recorded[f"out_{name}"]
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), name


@pytest.mark.parametrize(
  ("field", "right", "wrong"),
  [
    ("use_flow_sigmas", False, True),
    ("use_dynamic_shifting", False, True),
    ("timestep_type", "discrete", "continuous"),
    ("variance_type", "fixed_small", "learned_range"),
    ("shift_terminal", None, 0.1),
  ],
)
def test_steps_of_another_kind_of_model_are_refused(field, right, wrong):
  assert _parse(**{field: right}) == _parse()
  with pytest.raises(errors.CheckpointError, match=f"{field}={wrong!r}"):
    _parse(**{field: wrong})


def test_fields_that_no_scheduler_has_are_named(tmp_path):
  file = tmp_path / scheduler_config.FILE
  file.write_text(json.dumps(_FIELDS | {"mood": "good", "_x": 1}))
  (note,) = scheduler_config.notes(tmp_path)
  assert "mood='good'" in note
  assert "_x" not in note


def test_every_field_of_diffusers_schedulers_is_accounted_for(tmp_path):
  diffusers = pytest.importorskip("diffusers")
  for name in scheduler_config.CLASSES:
    scheduler = getattr(diffusers, name).__init__
    fields = inspect.signature(scheduler).parameters.values()
    fields = {p.name: p.default for p in fields if p.default is not p.empty}
    file = tmp_path / scheduler_config.FILE
    file.write_text(json.dumps(fields, default=repr))
    assert scheduler_config.notes(file) == [], name
