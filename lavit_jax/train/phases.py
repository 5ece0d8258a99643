"""The phases of a run: the entries of config.schedule, in steps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from lavit_jax.core import errors

_SHARED = ("steps", "lr", "warmup", "end_factor", "train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """One entry of config.schedule: the steps it spans and its settings.

  Every phase has the fields below. Settings of one stage alone, such as `mask`
  of stage tokenizer, are read by name: `phase["mask"]`.

  Attributes:
    name: its name in config.phases.
    start: the step it begins with.
    stop: the step after its last.
    lr: peak learning rate.
    warmup: steps of linear warm-up.
    end_factor: learning rate of the last step, as a share of `lr`.
    train: learning-rate group by prefix of a parameter path; see
      `optimizer.labels_of`.
    settings: the stage's own settings.
  """

  name: str
  start: int
  stop: int
  lr: float
  warmup: int = 0
  end_factor: float = 0.05
  train: Mapping[str, str] = dataclasses.field(default_factory=dict)
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def from_fields(
    cls, name: str, start: int, stop: int, fields: Mapping[str, Any]
  ) -> "Phase":
    """Builds a phase from an entry of config.phases.

    Args:
      name: its name.
      start: the step it begins with.
      stop: the step after its last; overrides the entry's `steps`.
      fields: the entry.
    """
    return cls(
      name=name,
      start=start,
      stop=stop,
      lr=float(fields["lr"]),
      warmup=int(fields.get("warmup", cls.warmup)),
      end_factor=float(fields.get("end_factor", cls.end_factor)),
      train=dict(fields.get("train", {})),
      settings={k: v for k, v in fields.items() if k not in _SHARED},
    )

  @property
  def steps(self) -> int:
    """Number of steps."""
    return self.stop - self.start

  def __getitem__(self, key: str) -> Any:
    """Returns the stage's setting `key`; KeyError if it is missing."""
    return self.settings[key]

  def get(self, key: str, default: Any = None) -> Any:
    """Returns the stage's setting `key`, or the default if it is missing."""
    return self.settings.get(key, default)

  def with_settings(self, **settings: Any) -> "Phase":
    """Returns the same phase with some of the stage's settings changed."""
    return dataclasses.replace(self, settings={**self.settings, **settings})


def has_prefix(path: str, prefix: str) -> bool:
  """Returns whether a parameter path starts with a prefix of `Phase.train`.

  Names are compared whole: "llm" is no prefix of "llm_proj". "" and "all" are
  prefixes of every path.
  """
  return prefix in ("", "all") or f"{path}/".startswith(f"{prefix}/")


def trains(config: ml_collections.ConfigDict, branch: str) -> bool:
  """Returns whether some phase of the schedule trains (a part of) a branch."""
  return any(
    has_prefix(branch, prefix) or has_prefix(prefix, branch)
    for name in config.schedule
    for prefix in config.phases[name].train
  )


def last_phase(config: ml_collections.ConfigDict) -> Phase:
  """Returns the last entry of config.schedule as if it were the only one.

  Held-out batches are judged by its settings, whatever config.steps is.
  """
  name = config.schedule[-1]
  fields = config.phases[name].to_dict()
  return Phase.from_fields(name, 0, int(fields["steps"]), fields)


def phases_of(config: ml_collections.ConfigDict) -> list[Phase]:
  """Returns the phases in the order of config.schedule with their steps.

  With config.steps > 0 the phases are shortened or lengthened in proportion,
  so that they add up to it; each keeps at least one step. Phases of 0 steps
  are left out.

  Raises:
    errors.ConfigError: the schedule names a phase that config.phases lacks, or
      there are no steps at all.
  """
  fields = config.phases.to_dict()
  if missing := [name for name in config.schedule if name not in fields]:
    raise errors.ConfigError(
      f"config.schedule names phases {missing}, but config.phases has only"
      f" {sorted(fields)}. Add them, or take them out of the schedule."
    )
  names = [name for name in config.schedule if fields[name]["steps"] > 0]
  if not names:
    raise errors.ConfigError("No phase of config.schedule has steps > 0.")
  stops = np.cumsum([int(fields[name]["steps"]) for name in names])
  if config.steps:
    stops = _scaled(stops, config.steps, names)
  starts = [0, *stops[:-1]]
  return [
    Phase.from_fields(name, int(start), int(stop), fields[name])
    for name, start, stop in zip(names, starts, stops, strict=True)
  ]


def _scaled(stops: np.ndarray, total: int, names: list[str]) -> np.ndarray:
  """Scales the last steps int[n] of n phases so that they end at `total`."""
  count = len(names)
  if total < count:
    raise errors.ConfigError(
      f"config.steps={total} is less than one step for each of the phases"
      f" {names}. Raise it, or take phases out of config.schedule."
    )
  stops = np.round(stops * total / stops[-1]).astype(int)
  earliest = np.arange(1, count + 1)  # one step each
  stops = np.clip(stops, earliest, total - count + earliest)
  return np.maximum.accumulate(stops - earliest) + earliest
