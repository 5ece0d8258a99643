"""All that a run has open is closed, whichever part raises an error."""

import contextlib
import logging
import types

import pytest

from lavit_jax.core import errors
from lavit_jax.train import loop
from lavit_jax.train.resilience import run_checkpoints
from lavit_jax.train.telemetry import run_log, writers


class _Open:
  """Records that it was closed; raises the given error."""

  def __init__(self, name, closed, error=None):
    self.name, self.closed, self.error = name, closed, error

  def close(self):
    self.closed.append(self.name)
    if self.error:
      raise self.error


_RUN = loop._Run
_NAMES = ("tracer", "meter", "writer", "batches", "checkpoints")


def _run(closed, **met):
  run, logs = object.__new__(_RUN), object.__new__(run_log.RunLog)
  opened = {name: _Open(name, closed, met.get(name)) for name in _NAMES}
  run.logs, run.awaits_saves = logs, True
  run.checkpoints, logs.tracer = opened["checkpoints"], opened["tracer"]
  logs._open = [opened[name] for name in ("meter", "writer", "batches")]
  return run


@pytest.mark.parametrize("failing", _NAMES)
def test_a_run_closes_all_it_has_open(failing):
  closed = []
  run = _run(closed, **{failing: OSError("503")})
  with pytest.raises(OSError, match="503"):
    run.close()
  assert closed == list(_NAMES)  # checkpoints last: they may take long


def test_every_error_of_closing_is_reported():
  run = _run([], meter=OSError("one"), checkpoints=OSError("two"))
  with pytest.raises(OSError, match="one") as caught:
    run.close()
  assert "two" in "".join(caught.value.__notes__)


def test_every_writer_is_closed():
  closed = []
  made = [_Open("a", closed, OSError("503")), _Open("b", closed)]
  with pytest.raises(OSError, match="503"):
    writers.MultiWriter(made).close()
  assert closed == ["a", "b"]


def test_checkpoints_that_could_not_be_written_are_closed(tmp_path):
  run = run_checkpoints.RunCheckpoints(tmp_path / "checkpoints")
  closed, manager = [], run._manager

  def full():
    raise OSError("disk full")

  run._manager = types.SimpleNamespace(
    wait_until_finished=full, close=lambda: closed.append(manager.close())
  )
  with pytest.raises(errors.CheckpointError, match="disk full"):
    run.close()
  assert closed == [None]
  with pytest.raises(RuntimeError, match="shutdown"):
    run._thread.submit(print)


def _leave_config_alone(monkeypatch):
  """The run is a stand-in, and has no config."""
  monkeypatch.setattr(loop.ranges, "check", lambda config: None)
  for name in ("check", "claim"):
    monkeypatch.setattr(loop.workdir_lib, name, lambda config, workdir: "")


@pytest.mark.parametrize(
  "error",
  [errors.Preempted("step 3 is saved"), ValueError("a bug"), SystemExit(2)],
)
def test_closing_replaces_no_error(monkeypatch, caplog, error):
  """Preempted is exit status 75, by which a run is started again."""

  def made(*unused):
    run = _run([], writer=OSError("the log is lost"))
    run.stop_signal = contextlib.nullcontext()

    def failing(stop_at):
      raise error

    run.train = failing
    return run

  monkeypatch.setattr(loop, "_Run", made)
  _leave_config_alone(monkeypatch)
  with (
    caplog.at_level(logging.WARNING),
    pytest.raises(type(error)) as caught,
  ):
    loop.train(None, "unused")
  assert caught.value is error
  assert "the log is lost" in caplog.text


def test_an_error_of_closing_alone_is_that_of_the_run(monkeypatch):
  def made(*unused):
    run = _run([], writer=OSError("the log is lost"))
    run.stop_signal = contextlib.nullcontext()
    run.train = lambda stop_at: {"loss": 1.0}
    return run

  monkeypatch.setattr(loop, "_Run", made)
  _leave_config_alone(monkeypatch)
  with pytest.raises(OSError, match="the log is lost"):
    loop.train(None, "unused")
