"""A workdir belongs to one run: its config is stored in it."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import ml_collections
from etils import epath

from lavit_jax.core import errors, hosts
from lavit_jax.core.storage import checkpoints, files
from lavit_jax.train.resilience import versions

# Fields that may change when a run goes on: how often it logs, where and how
# fast it runs, and the size of its batches (see `data_position`).
_MAY_CHANGE = (
  "log",
  "checkpoint",
  "eval",
  "mesh",
  "nonfinite",
  "batch_size",
  "accumulate",
  "compiler_options",
  "accept",
)
# Likewise at any depth: of every network, and the bad examples data may have.
# Weights may change as `Objective.check_data` allows.
_MAY_CHANGE_ANYWHERE = ("remat", "unroll", "limit_share", "reweighted")
# Of configs that lack the field.
_DEFAULTS = {"dtype": "float32", "weight_by": "documents"}

_LOG = logging.getLogger(__name__)


def check(
  config: ml_collections.ConfigDict, workdir: str | epath.Path
) -> epath.Path:
  """Checks that a workdir is this run's or no run's; writes nothing.

  Args:
    config: of the run.
    workdir: a path that all processes see; `gs://` and the like too.

  Returns:
    The workdir as a path.

  Raises:
    errors.ConfigError: it holds a run with another config.
    errors.CheckpointError: it or config.model_dir has a name that Orbax cannot
      keep arrays under.
  """
  for folder in (workdir, config.model_dir):
    files.check_arrays_folder(folder, write=True)
  workdir = files.path_of(workdir)
  path = workdir / "config.json"
  current = _as_json(config)
  stored = json.loads(path.read_text()) if path.exists() else current
  if changed := differences(stored, current):
    raise errors.ConfigError(
      f"{workdir} holds a run with another config; it differs in"
      f" {', '.join(changed[:6])}. Use another --workdir, or the config"
      f" stored in {path}."
    )
  return workdir


def claim(
  config: ml_collections.ConfigDict, workdir: str | epath.Path
) -> epath.Path:
  """Checks a workdir and makes it this run's by storing the config in it.

  The versions of the libraries are stored too: a run that goes on with others
  is warned. To be called once the config is known to be good: a config that is
  refused leaves the workdir to the next. All processes call this.

  Arguments, result and errors are those of `check`.
  """
  workdir = check(config, workdir)  # again: it may be another's by now
  path, current = workdir / "config.json", _as_json(config)
  if path.exists() and _adds_compute(json.loads(path.read_text()), current):
    compute = current["model"]["compute"]
    _LOG.warning(
      "%s was begun without config.model.compute: from here on the networks"
      " of its model directory are computed as the config says (%s)",
      workdir,
      ", ".join(f"{name} {x.get('dtype')}" for name, x in compute.items()),
    )
  hosts.barrier("lavit_workdir")  # nobody reads what is being written
  if hosts.is_lead():
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(current, indent=1, sort_keys=True) + "\n"
    files.write_whole(path, text.encode())
  hosts.barrier("lavit_workdir_made")
  versions.check(workdir)
  return workdir


def warn_of_replaced_part(config: ml_collections.ConfigDict, part: str) -> None:
  """Warns of a part of another run that this run will overwrite at its end."""
  folder = config.model_dir
  if not hosts.is_lead() or part not in checkpoints.parts_in(folder):
    return
  try:
    stored = checkpoints.read_meta(folder, part).get("config")
  except errors.CheckpointError:  # damaged: it will be replaced
    return
  if stored is None or differences(stored, _as_json(config)):
    _LOG.warning(
      "%s has a part %r that is not of this run: at its end this run writes"
      " over it. To keep it, give another --config.model_dir.",
      folder,
      part,
    )


def _as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  return json.loads(config.to_json_best_effort())


def differences(
  stored: Mapping[str, Any], current: Mapping[str, Any]
) -> list[str]:
  """Describes the fields in which two configs are not the same run.

  A run that was begun before `model.compute` existed goes on with the current
  one: until then each part of the model directory said how it is computed.

  Args:
    stored: a config as JSON.
    current: this run's config as JSON.
  """
  if _adds_compute(stored, current):
    compute = {"compute": current["model"]["compute"]}
    stored = {**stored, "model": {**stored.get("model", {}), **compute}}
  return _differences(_fixed_fields(stored), _fixed_fields(current))


def _adds_compute(
  stored: Mapping[str, Any], current: Mapping[str, Any]
) -> bool:
  """Returns whether only the current config has model.compute."""
  compute = current.get("model", {}).get("compute")
  return bool(compute) and "compute" not in stored.get("model", {})


def _fixed_fields(config: Mapping[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in config.items() if k not in _MAY_CHANGE}


def _differences(stored: Any, current: Any, prefix: str = "") -> list[str]:
  """Describes fields that differ; a missing field equals an empty or zero one.

  So a run goes on under newer code, whose new fields are off by default.
  """
  if {type(stored), type(current)} <= {dict, type(None)}:
    stored, current = stored or {}, current or {}
    return [
      line
      for key in sorted({*stored, *current} - {*_MAY_CHANGE_ANYWHERE})
      for line in _differences(
        stored.get(key, _DEFAULTS.get(key)),
        current.get(key, _DEFAULTS.get(key)),
        f"{prefix}{key}.",
      )
    ]
  both_off = None in (stored, current) and not stored and not current
  if stored == current or both_off:
    return []
  return [f"{prefix[:-1]} ({stored!r} there, {current!r} here)"]
