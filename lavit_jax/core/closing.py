"""Ends several things: what one of them meets keeps no other from its end."""

import logging
from collections.abc import Callable, Iterable

_LOG = logging.getLogger(__name__)


def each(calls: Iterable[Callable[[], object]]) -> None:
  """Makes every call, then raises the first error; it notes the others."""
  first: Exception | None = None
  for call in calls:
    try:
      call()
    except Exception as error:
      if first is None:
        first = error
      else:
        first.add_note(f"Then {type(error).__name__}: {error}")
  if first is not None:
    raise first


def after(error: BaseException, call: Callable[[], object]) -> None:
  """Makes a call while `error` is raised, in whose place none may come.

  Who started the program goes by that one: after Preempted it is started again.
  """
  try:
    call()
  except Exception as another:
    _LOG.warning(
      "after %s, what was open could not be ended in good order",
      type(error).__name__,
      exc_info=another,
    )
