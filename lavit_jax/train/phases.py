"""The phases of a run: config.schedule, in steps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lavit_jax.core import errors


@dataclasses.dataclass(frozen=True)
class Phase:
  """One entry of config.schedule: its settings and the steps it spans."""

  name: str
  start: int
  stop: int
  settings: Mapping[str, Any]

  def __getitem__(self, key):
    return self.settings[key]

  def get(self, key, default=None):
    """The setting `key`, or the default."""
    return self.settings.get(key, default)


def begins(path: str, prefix: str) -> bool:
  """Whether a path of a parameter begins with the names of `phase.train`.

  Names are whole: "llm" is not "llm_proj". "" and "all" begin every path.
  """
  return prefix in ("", "all") or f"{path}/".startswith(f"{prefix}/")


def trains(config, branch: str) -> bool:
  """Whether some phase of the schedule trains a branch, or a part of it."""
  return any(
    begins(branch, prefix) or begins(prefix, branch)
    for name in config.schedule
    for prefix in config.phases[name].train
  )


def phases_of(config) -> list[Phase]:
  """Phases in the order of config.schedule, with their step ranges.

  With config.steps > 0 the phases are shortened or lengthened in proportion,
  so that they add up to it; each keeps at least one step.

  Raises:
    errors.ConfigError: a phase that is not there, or no steps at all.
  """
  settings = config.phases.to_dict()
  if missing := [name for name in config.schedule if name not in settings]:
    raise errors.ConfigError(
      f"config.schedule names phases {missing}, but config.phases has only"
      f" {sorted(settings)}. Add them, or take them out of the schedule."
    )
  names = [name for name in config.schedule if settings[name]["steps"] > 0]
  if not names:
    raise errors.ConfigError("No phase of config.schedule has steps > 0.")
  ends = np.cumsum([int(settings[name]["steps"]) for name in names])
  if config.steps:
    if config.steps < len(names):
      raise errors.ConfigError(
        f"config.steps={config.steps} is less than one step for each of the"
        f" phases {names}. Raise it, or take phases out of config.schedule."
      )
    ends = np.round(ends * config.steps / ends[-1]).astype(int)
    floor = np.arange(1, len(names) + 1)
    ends = np.clip(ends, floor, config.steps - len(names) + floor)
    ends = np.maximum.accumulate(ends - floor) + floor
  starts = [0, *ends[:-1]]
  return [
    Phase(
      name,
      int(start),
      int(stop),
      settings[name] | {"steps": int(stop - start)},
    )
    for name, start, stop in zip(names, starts, ends, strict=True)
  ]
