"""What fails for a moment is tried again; what hangs is told."""

import threading
import time

import pytest

from lavit_jax.core.storage import patient


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  monkeypatch.setattr(patient, "_FIRST_PAUSE", 0.001)


def test_what_fails_for_a_moment_is_read(caplog):
  left = [OSError("503"), RuntimeError("reset"), TimeoutError()]

  def call():
    if left:
      raise left.pop()
    return b"data"

  assert patient.ask("gs://b/x", call) == b"data"
  assert "gs://b/x could not be read (TimeoutError); try 2 of 5" in caplog.text
  assert "503" in caplog.text


def test_what_always_fails_is_told():
  calls = []

  def call():
    calls.append(1)
    raise RuntimeError("quota is\nused up")

  with pytest.raises(OSError, match=r"gs://b/x could .* 5 tries \(quota is us"):
    patient.ask("gs://b/x", call)
  assert len(calls) == 5


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_what_another_try_does_not_change_is_told_at_once(error):
  calls = []

  def call():
    calls.append(1)
    raise error("x")

  with pytest.raises(error):
    patient.ask("gs://b/x", call)
  assert len(calls) == 1


def test_what_does_not_answer_is_given_up(monkeypatch):
  monkeypatch.setattr(patient, "_TIMEOUT", 0.05)
  over, calls = threading.Event(), []

  def call():
    calls.append(1)
    if len(calls) < 3:
      over.wait(30)
    return b"data"

  begun = time.monotonic()
  assert patient.ask("gs://b/x", call) == b"data"
  calls.clear()
  with pytest.raises(OSError, match=r"no answer within 0\.05 seconds"):
    patient.ask("gs://b/x", lambda: over.wait(30))
  over.set()
  assert time.monotonic() - begun < 10
