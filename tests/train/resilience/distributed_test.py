"""How processes join by environment variables, and how they fail."""

import jax
import pytest

from lavit_jax.core import errors
from lavit_jax.train.resilience import distributed


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


def _environment(address="host:1", count="4", number="3"):
  return {
    "LAVIT_COORDINATOR": address,
    "LAVIT_NUM_PROCESSES": count,
    "LAVIT_PROCESS_ID": number,
  }


def test_without_variables_a_run_is_one_process(joined):
  distributed.initialize({})
  distributed.initialize({"LAVIT_DISTRIBUTED": "0", "SLURM_JOB_ID": "7"})
  assert not joined


def test_variables_say_which_process_it_is(joined):
  distributed.initialize(_environment())
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
  distributed.initialize(_environment())
  assert not joined


@pytest.mark.parametrize(
  ("environment", "says"),
  [
    ({"LAVIT_COORDINATOR": "h:1"}, "LAVIT_NUM_PROCESSES, LAVIT_PROCESS_ID is"),
    (_environment(number="4"), "below n"),
    (_environment(count="four"), "LAVIT_NUM_PROCESSES=four"),
    ({"LAVIT_PROCESS_ID": "0"}, "LAVIT_COORDINATOR, LAVIT_NUM_PROCESSES is"),
  ],
)
def test_incomplete_variables_are_refused(joined, environment, says):
  with pytest.raises(errors.ConfigError, match=says):
    distributed.initialize(environment)
  assert not joined


def test_a_coordinator_out_of_reach_is_named(joined, monkeypatch):
  def fail(**given):
    raise RuntimeError("DEADLINE_EXCEEDED: no answer")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(errors.Unreachable, match="host:1 can be reached") as e:
    distributed.initialize(_environment())
  assert e.value.exit_status not in (0, 2, 75)  # launchers try again


@pytest.fixture
def several(monkeypatch):
  """As one of two processes; undone, so that this one goes on living."""
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(distributed._LastWords, "failed", False)


@pytest.mark.parametrize(
  "error",
  [
    ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"),
    RuntimeError("UNAVAILABLE: Failed to send RPC to coordination service."),
    errors.CheckpointError("could not be written: Barrier timed out: save"),
  ],
)
def test_the_death_of_another_process_is_said_to_be_that(several, error):
  named = pytest.raises(errors.PeerLost, match="another process")
  with named as caught, distributed.failing_together():
    raise error
  assert caught.value.__cause__ is error
  assert caught.value.exit_status not in (0, 2, 75)


@pytest.mark.parametrize(
  "error",
  [ValueError("wrong shape"), errors.DataError("a task has an error: read")],
)
def test_other_errors_stay_as_they_are_and_end_the_run(several, error):
  with pytest.raises(type(error)) as caught, distributed.failing_together():
    raise error
  assert caught.value is error
  assert distributed._LastWords.failed


def test_a_notice_is_no_failure(several):
  with pytest.raises(errors.Preempted), distributed.failing_together():
    raise errors.Preempted("saved")
  assert not distributed._LastWords.failed
  distributed.leave(75, "nothing happens")


def test_one_process_has_no_peers():
  error = ValueError("Gloo: connection closed by peer")
  named = pytest.raises(ValueError, match="Gloo")
  with named as caught, distributed.failing_together():
    raise error
  assert caught.value is error
  assert not distributed._LastWords.failed
