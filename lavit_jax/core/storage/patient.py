"""Reads from an object store, which may fail now and then, or not answer."""

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

_LOG = logging.getLogger(__name__)
_TRIES = 5
_FIRST_PAUSE = 0.5  # seconds; each pause is twice the one before
_TIMEOUT = 120.0  # seconds that one try may take
# What another try does not change.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError)
T = TypeVar("T")


def ask(what: Any, call: Callable[[], T]) -> T:
  """Returns what a call returns, tried several times.

  Args:
    what: is read, for messages.
    call: reads it; may be called again while an earlier call hangs.

  Raises:
    FileNotFoundError, PermissionError, IsADirectoryError, ValueError: the call
      raised it.
    OSError: five tries have failed, or have not ended within two minutes each.
  """
  pause = _FIRST_PAUSE
  for number in range(1, _TRIES + 1):
    try:
      return _timed(call)
    except _FINAL:
      raise
    except Exception as error:  # stores have errors of many classes
      reason = " ".join(str(error).split()) or type(error).__name__
      if number == _TRIES:
        raise OSError(
          f"{what} could not be read in {_TRIES} tries ({reason[:200]})"
        ) from error
      _LOG.warning(
        "%s could not be read (%s); try %d of %d follows",
        *(what, reason[:200], number + 1, _TRIES),
      )
    time.sleep(pause)
    pause *= 2
  raise AssertionError("not reached")


def _timed(call):
  """Returns what a call returns; TimeoutError if it does not end."""
  future: concurrent.futures.Future = concurrent.futures.Future()

  def run():
    try:
      future.set_result(call())
    except BaseException as error:  # raised where it is awaited
      future.set_exception(error)

  threading.Thread(target=run, daemon=True).start()
  try:
    return future.result(timeout=_TIMEOUT)
  except concurrent.futures.TimeoutError as error:
    if future.done():  # the call raised one itself
      raise
    raise TimeoutError(f"no answer within {_TIMEOUT:g} seconds") from error
