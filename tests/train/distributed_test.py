"""Which processes belong to a run, as the environment tells."""

import jax
import pytest

from lavit_jax import errors
from lavit_jax.train import distributed


@pytest.fixture
def joined(monkeypatch):
  """What `jax.distributed.initialize` was called with."""
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **given: calls.append(given)
  )
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
  monkeypatch.setattr(jax.config, "update", lambda name, value: None)
  return calls


def _told(address="host:1", count="4", number="3"):
  return {
    "LAVIT_COORDINATOR": address,
    "LAVIT_NUM_PROCESSES": count,
    "LAVIT_PROCESS_ID": number,
  }


def test_without_a_word_a_run_is_one_process(joined):
  distributed.initialize({})
  distributed.initialize({"LAVIT_DISTRIBUTED": "0", "SLURM_JOB_ID": "7"})
  assert not joined


def test_by_hand_each_process_is_told_who_it_is(joined):
  distributed.initialize(_told())
  (call,) = joined
  assert call.pop("heartbeat_timeout_seconds") <= 60
  assert call.pop("shutdown_timeout_seconds") <= 60
  assert call == {
    "coordinator_address": "host:1",
    "num_processes": 4,
    "process_id": 3,
    "cluster_detection_method": "deactivate",
  }


def test_a_cluster_is_asked_where_jax_knows_it(joined):
  distributed.initialize({"LAVIT_DISTRIBUTED": "1"})
  assert set(joined[0]) == {
    "heartbeat_timeout_seconds",
    "shutdown_timeout_seconds",
  }


def test_nobody_joins_twice(joined, monkeypatch):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  distributed.initialize(_told())
  assert not joined


@pytest.mark.parametrize(
  ("environment", "says"),
  [
    ({"LAVIT_COORDINATOR": "h:1"}, "LAVIT_NUM_PROCESSES, LAVIT_PROCESS_ID is"),
    (_told(number="4"), "below n"),
    (_told(count="four"), "LAVIT_NUM_PROCESSES=four"),
    ({"LAVIT_PROCESS_ID": "0"}, "LAVIT_COORDINATOR, LAVIT_NUM_PROCESSES is"),
  ],
)
def test_half_of_it_is_refused(joined, environment, says):
  with pytest.raises(errors.ConfigError, match=says):
    distributed.initialize(environment)
  assert not joined


def test_a_coordinator_out_of_reach_is_named(joined, monkeypatch):
  def fail(**given):
    raise RuntimeError("DEADLINE_EXCEEDED: no answer")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(errors.Unreachable, match="host:1 can be reached") as e:
    distributed.initialize(_told())
  assert e.value.exit_status not in (0, 2, 75)  # launchers try again
