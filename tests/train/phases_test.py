"""Phases of a run: typed fields, the stage's own settings, steps in turn."""

import dataclasses

import ml_collections
import pytest

from lavit_jax.core import errors
from lavit_jax.train import phases


def _config(**fields):
  plan = {
    "first": {"steps": 6, "lr": 1e-3, "train": {"all": "base"}, "mask": "a"},
    "second": {"steps": 2, "lr": 2.0, "warmup": 1, "train": {"net": "slow"}},
    "none": {"steps": 0, "lr": 1.0, "train": {}},
  }
  config = {"schedule": ("first", "none", "second"), "steps": 0, "phases": plan}
  return ml_collections.ConfigDict(config | fields)


def test_fields_of_every_phase_are_typed_and_the_rest_are_settings():
  first, second = phases.phases_of(_config())
  assert first == phases.Phase(
    name="first",
    start=0,
    stop=6,
    lr=1e-3,
    train={"all": "base"},
    settings={"mask": "a"},
  )
  assert (second.start, second.steps, second.warmup) == (6, 2, 1)
  assert first["mask"] == first.get("mask") == "a"
  assert second.get("mask", "b") == "b"
  with pytest.raises(KeyError):
    second["mask"]


def test_a_phase_with_other_settings_is_another_phase():
  first, _ = phases.phases_of(_config())
  changed = first.with_settings(mask="b", draws=2)
  assert changed.settings == {"mask": "b", "draws": 2}
  assert first["mask"] == "a"
  with pytest.raises(dataclasses.FrozenInstanceError):
    first.lr = 1.0


@pytest.mark.parametrize(
  ("steps", "stops"), [(0, [6, 8]), (4, [3, 4]), (16, [12, 16]), (2, [1, 2])]
)
def test_phases_are_scaled_to_the_steps_of_the_run(steps, stops):
  found = phases.phases_of(_config(steps=steps))
  assert [phase.stop for phase in found] == stops
  assert [phase.start for phase in found] == [0, stops[0]]


def test_each_phase_needs_a_step():
  with pytest.raises(errors.ConfigError, match="less than one step for each"):
    phases.phases_of(_config(steps=1))
  with pytest.raises(errors.ConfigError, match="No phase"):
    phases.phases_of(_config(schedule=("none",)))


def test_the_last_phase_keeps_its_steps_whatever_those_of_the_run():
  last = phases.last_phase(_config(steps=16))
  assert (last.name, last.start, last.stop) == ("second", 0, 2)
  assert last.train == {"net": "slow"}
