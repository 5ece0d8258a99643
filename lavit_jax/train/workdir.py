"""A workdir belongs to one run: which config it has, where its files lie."""

import json

from etils import epath

from lavit_jax import errors, files, hosts

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
_LOOSE_ANYWHERE = ("remat", "unroll")  # of every network


def check(config, workdir) -> epath.Path:
  """The workdir as a path, made if it is missing, its config stored in it.

  With several processes all of them call this.

  Args:
    config: of the run.
    workdir: a path that all processes see; `gs://` and the like too.

  Raises:
    errors.ConfigError: it holds a run with another config.
  """
  workdir = files.path_of(workdir)
  path = workdir / "config.json"
  ours = json.loads(config.to_json_best_effort())
  theirs = json.loads(path.read_text()) if path.exists() else ours
  if changed := differences(theirs, ours):
    raise errors.ConfigError(
      f"{workdir} holds a run with another config; it differs in"
      f" {', '.join(changed[:6])}. Use another --workdir, or the config"
      f" stored in {path}."
    )
  hosts.barrier("lavit_workdir")  # nobody reads what is being written
  if hosts.first():
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(ours, indent=1, sort_keys=True) + "\n"
    files.write_whole(path, text.encode())
  hosts.barrier("lavit_workdir_made")
  return workdir


def differences(theirs: dict, ours: dict) -> list[str]:
  """Fields of two configs, as JSON has them, by which runs are not the same."""
  return _differences(_identity(theirs), _identity(ours))


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
      for line in _differences(a.get(key), b.get(key), f"{prefix}{key}.")
    ]
  both_off = None in (a, b) and not a and not b
  if a == b or both_off:
    return []
  return [f"{prefix[:-1]} ({a!r} there, {b!r} here)"]
