"""A workdir belongs to one run: which config it has, where its files lie."""

import json
import logging

from etils import epath

from lavit_jax.core import errors, hosts
from lavit_jax.core.storage import checkpoints, files
from lavit_jax.train.resilience import versions

# What may change when a run goes on: lengths of logs, where and how fast it
# runs, and the size of its batches (see `position`).
_LOOSE = (
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
# Of every network, and of data: how many bad samples are allowed.
_LOOSE_ANYWHERE = ("remat", "unroll", "limit_share")
_USUAL = {"dtype": "float32"}  # of every network whose config has none

_LOG = logging.getLogger(__name__)


def check(config, workdir) -> epath.Path:
  """The workdir as a path, if it is this run's or nobody's; writes nothing.

  Args:
    config: of the run.
    workdir: a path that all processes see; `gs://` and the like too.

  Raises:
    errors.ConfigError: it holds a run with another config.
    errors.CheckpointError: it or config.model_dir has a name that Orbax cannot
      keep arrays under.
  """
  for folder in (workdir, config.model_dir):
    files.check_arrays_folder(folder, write=True)
  workdir = files.path_of(workdir)
  path = workdir / "config.json"
  ours = _stored(config)
  theirs = json.loads(path.read_text()) if path.exists() else ours
  if changed := differences(theirs, ours):
    raise errors.ConfigError(
      f"{workdir} holds a run with another config; it differs in"
      f" {', '.join(changed[:6])}. Use another --workdir, or the config"
      f" stored in {path}."
    )
  return workdir


def claim(config, workdir) -> epath.Path:
  """`check`, and the workdir is this run's: its config is stored in it.

  The versions of the libraries too: a run that goes on with others is warned.
  Called once the config has been found good: one that is refused leaves the
  workdir to the next.

  With several processes all of them call this.
  """
  workdir = check(config, workdir)  # again: it may be another's by now
  path, ours = workdir / "config.json", _stored(config)
  if path.exists() and _lacks_compute(json.loads(path.read_text()), ours):
    compute = ours["model"]["compute"]
    _LOG.warning(
      "%s was begun without config.model.compute: from here on the networks"
      " of its model directory are computed as the config says (%s)",
      workdir,
      ", ".join(f"{name} {x.get('dtype')}" for name, x in compute.items()),
    )
  hosts.barrier("lavit_workdir")  # nobody reads what is being written
  if hosts.is_lead():
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(ours, indent=1, sort_keys=True) + "\n"
    files.write_whole(path, text.encode())
  hosts.barrier("lavit_workdir_made")
  versions.check(workdir)
  return workdir


def say_replaced(config, part: str) -> None:
  """Warns of a part of another run that this one writes over at its end."""
  folder = config.model_dir
  if not hosts.is_lead() or part not in checkpoints.parts_in(folder):
    return
  try:
    theirs = checkpoints.read_meta(folder, part).get("config")
  except errors.CheckpointError:  # damaged: to be made again
    return
  if theirs is None or differences(theirs, _stored(config)):
    _LOG.warning(
      "%s has a part %r that is not of this run: at its end this run writes"
      " over it. To keep it, give another --config.model_dir.",
      folder,
      part,
    )


def _stored(config) -> dict:
  """A config as JSON has it."""
  return json.loads(config.to_json_best_effort())


def differences(theirs: dict, ours: dict) -> list[str]:
  """Fields of two configs, as JSON has them, by which runs are not the same.

  A run from before `model.compute` was goes on as ours says: until then each
  part of the model directory said itself how it was computed.
  """
  if _lacks_compute(theirs, ours):
    compute = ours["model"]["compute"]
    theirs = theirs | {"model": theirs.get("model", {}) | {"compute": compute}}
  return _differences(_identity(theirs), _identity(ours))


def _lacks_compute(theirs: dict, ours: dict) -> bool:
  """Whether ours alone says how networks of a model directory are computed."""
  compute = ours.get("model", {}).get("compute")
  return bool(compute) and "compute" not in theirs.get("model", {})


def _identity(config: dict) -> dict:
  return {k: v for k, v in config.items() if k not in _LOOSE}


def _differences(a, b, prefix="") -> list[str]:
  """Fields that differ. One that is missing is as one that is empty or zero.

  So a run goes on under newer code, whose new fields are off by default.
  """
  if {type(a), type(b)} <= {dict, type(None)}:
    a, b = a or {}, b or {}
    return [
      line
      for key in sorted({*a, *b} - {*_LOOSE_ANYWHERE})
      for line in _differences(
        a.get(key, _USUAL.get(key)),
        b.get(key, _USUAL.get(key)),
        f"{prefix}{key}.",
      )
    ]
  both_off = None in (a, b) and not a and not b
  if a == b or both_off:
    return []
  return [f"{prefix[:-1]} ({a!r} there, {b!r} here)"]
