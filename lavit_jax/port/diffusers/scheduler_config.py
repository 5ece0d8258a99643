"""diffusers' scheduler_config.json, read and written as a `NoiseSchedule`.

The official code loads the file as a DDIMScheduler, whichever scheduler it
names. Fields that DDIM does not have are ignored (`skip_prk_steps` of a PNDM
file, `interpolation_type` of an Euler file). Fields that are missing or listed
under `_use_default_values` have DDIM's defaults, such as `clip_sample` true.
This module does the same, except that it refuses fields of a U-Net that DDIM
cannot use: of flows, of continuous steps, of learned variances.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from lavit_jax.core import errors
from lavit_jax.diffusion import schedules
from lavit_jax.port.formats import config_fields, small_files

FILE = "scheduler_config.json"
_DDIM = "DDIMScheduler"
# Schedulers that diffusers lists as compatible with DDIM, with the same betas.
CLASSES = (
  _DDIM,
  "DDPMScheduler",
  "DEISMultistepScheduler",
  "DPMSolverMultistepScheduler",
  "DPMSolverSDEScheduler",
  "DPMSolverSinglestepScheduler",
  "EulerAncestralDiscreteScheduler",
  "EulerDiscreteScheduler",
  "HeunDiscreteScheduler",
  "KDPM2AncestralDiscreteScheduler",
  "KDPM2DiscreteScheduler",
  "LMSDiscreteScheduler",
  "PNDMScheduler",
  "UniPCMultistepScheduler",
)
DEFAULTS = {  # DDIMScheduler's
  "num_train_timesteps": 1000,
  "beta_start": 0.0001,
  "beta_end": 0.02,
  "beta_schedule": "linear",
  "trained_betas": None,
  "clip_sample": True,
  "set_alpha_to_one": True,
  "steps_offset": 0,
  "prediction_type": "epsilon",
  "thresholding": False,
  "dynamic_thresholding_ratio": 0.995,
  "clip_sample_range": 1.0,
  "sample_max_value": 1.0,
  "timestep_spacing": "leading",
  "rescale_betas_zero_snr": False,
}
# Fields of the other schedulers that state what the U-Net was trained for, with
# the values that DDIM, which has none of these fields, computes.
_FIXED = {
  "use_flow_sigmas": (None, False),
  "use_dynamic_shifting": (None, False),
  "shift_terminal": (None,),
  "timestep_type": (None, "discrete"),
  "variance_type": (
    None,
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
  ),
}
_SOLVERS = """
  algorithm_type disable_corrector euler_at_final final_sigmas_type flow_shift
  interpolation_type lambda_min_clipped lower_order_final noise_sampler_seed
  predict_x0 sigma_max sigma_min skip_prk_steps solver_order solver_p
  solver_type time_shift_type use_beta_sigmas use_exponential_sigmas
  use_karras_sigmas use_lu_lambdas
"""
_PREDICTIONS = {
  "epsilon": "epsilon",
  "v_prediction": "velocity",
  "sample": "sample",
}
_NAMES = {
  "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
  "prediction_type": tuple(_PREDICTIONS),
  "timestep_spacing": schedules.SPACINGS,
}


def _read(path) -> tuple[dict[str, Any], str]:
  """Returns the fields of a folder's file or of a file, and its label."""
  path = pathlib.Path(path)
  file = path if path.suffix == ".json" else path / FILE
  label = "/".join(file.parts[-3:])
  return small_files.read_json(file, label), label


def load(path: str | os.PathLike) -> schedules.NoiseSchedule:
  """Returns the schedule of a scheduler's folder, or of its file.

  Raises:
    errors.CheckpointError: there is no such file, or see `parse`.
  """
  return parse(*_read(path))


def parse(
  content: Mapping[str, Any], label: str = FILE
) -> schedules.NoiseSchedule:
  """Returns the schedule that a scheduler_config.json describes.

  Args:
    content: its fields.
    label: how messages name it.

  Raises:
    errors.CheckpointError: it names an unknown scheduler, or a field has an
      unknown value or a wrong type.
  """
  name = content.get("_class_name", _DDIM)
  if name not in CLASSES:
    raise errors.CheckpointError(
      f"{label} names the scheduler {name!r}, which cannot be loaded as DDIM:"
      f" expected one of {', '.join(CLASSES)}."
    )
  fields = _fields(content, label)
  clip = fields["clip_sample_range"] if fields["clip_sample"] else None
  if fields["thresholding"]:
    clip = (fields["dynamic_thresholding_ratio"], fields["sample_max_value"])
  try:
    return schedules.NoiseSchedule(
      num_steps=fields["num_train_timesteps"],
      kind=fields["beta_schedule"],
      beta_start=fields["beta_start"],
      beta_end=fields["beta_end"],
      betas=fields["trained_betas"],
      zero_snr=fields["rescale_betas_zero_snr"],
      spacing=fields["timestep_spacing"],
      steps_offset=fields["steps_offset"],
      alpha_to_one=fields["set_alpha_to_one"],
      prediction=_PREDICTIONS[fields["prediction_type"]],
      clip=clip,
    )
  except errors.ConfigError as e:
    raise errors.CheckpointError(f"{label} cannot be used. {e}") from e


def notes(path: str | os.PathLike) -> list[str]:
  """Returns one sentence on fields that no scheduler of CLASSES has, if any.

  Args:
    path: as `load` takes it.
  """
  content, label = _read(path)
  known = {*DEFAULTS, *_FIXED, *_SOLVERS.split()}
  unknown = [
    f"{name}={value!r}"[:100]
    for name, value in sorted(content.items())
    if name not in known and not name.startswith("_")
  ]
  if not unknown:
    return []
  return [
    f"{label} has fields that lavit_jax does not know and ignored:"
    f" {', '.join(unknown)}"
  ]


def _fields(content, label):
  """Returns all of DDIM's fields, each checked."""
  for name, allowed in _FIXED.items():
    if content.get(name) not in allowed:
      raise errors.CheckpointError(
        f"{label} has {name}={content[name]!r}: expected"
        f" {' or '.join(repr(a) for a in allowed if a is not None) or 'null'}."
        " Its U-Net was trained for other steps than those of DDIM."
      )
  absent = content.get("_use_default_values")
  absent = [] if absent is None else absent
  if not isinstance(absent, list | tuple) or not all(
    isinstance(name, str) for name in absent
  ):
    raise errors.CheckpointError(
      f"{label} has _use_default_values={absent!r}: expected a list of names,"
      " or null."
    )
  present = {k: v for k, v in content.items() if k not in absent}
  fields = {k: present.get(k, default) for k, default in DEFAULTS.items()}
  for name, value in fields.items():
    if expected := _expected(name, value):
      raise errors.CheckpointError(
        f"{label} has {name}={value!r}: expected {expected}."
      )
  if fields["trained_betas"] is not None:
    fields["trained_betas"] = tuple(map(float, fields["trained_betas"]))
  return fields


def _expected(name, value):
  """Returns a description of valid values where a value is wrong, else None."""
  default = DEFAULTS[name]
  if name in _NAMES:
    return (
      None if value in _NAMES[name] else f"one of {', '.join(_NAMES[name])}"
    )
  if name == "trained_betas":
    valid = isinstance(value, list | tuple) and all(
      map(config_fields.is_number, value)
    )
    return None if value is None or valid else "a list of numbers, or null"
  if isinstance(default, bool):
    return None if isinstance(value, bool) else "true or false"
  if isinstance(default, int):
    valid = isinstance(value, int) and config_fields.is_number(value)
    return None if valid else "a whole number"
  return None if config_fields.is_number(value) else "a number"


def unparse(schedule: schedules.NoiseSchedule) -> dict[str, Any]:
  """Returns the fields of a DDIMScheduler's file, inversely to `parse`.

  Raises:
    errors.UsageError: diffusers has no such schedule.
  """
  if schedule.kind not in _NAMES["beta_schedule"] and schedule.betas is None:
    raise errors.UsageError(
      f"A schedule of kind {schedule.kind!r} cannot be written as {FILE}:"
      f" diffusers knows {', '.join(_NAMES['beta_schedule'])}."
    )
  predictions = {here: name for name, here in _PREDICTIONS.items()}
  clip = schedule.clip
  dynamic = isinstance(clip, tuple)
  fields = DEFAULTS | {
    "num_train_timesteps": schedule.num_steps,
    "beta_start": schedule.beta_start,
    "beta_end": schedule.beta_end,
    "beta_schedule": schedule.kind,
    "trained_betas": schedule.betas and list(schedule.betas),
    "clip_sample": clip is not None and not dynamic,
    "set_alpha_to_one": schedule.alpha_to_one,
    "steps_offset": schedule.steps_offset,
    "prediction_type": predictions[schedule.prediction],
    "thresholding": dynamic,
    "timestep_spacing": schedule.spacing,
    "rescale_betas_zero_snr": schedule.zero_snr,
  }
  if isinstance(clip, tuple):
    fields["dynamic_thresholding_ratio"], fields["sample_max_value"] = clip
  elif clip is not None:
    fields["clip_sample_range"] = clip
  return {"_class_name": _DDIM} | dict(sorted(fields.items()))
