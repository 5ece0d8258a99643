"""Closes several resources, all of them even if one raises an error."""

import logging
from collections.abc import Callable, Iterable

_LOG = logging.getLogger(__name__)


def each(calls: Iterable[Callable[[], object]]) -> None:
  """Makes every call, then raises the first error, with notes of the others."""
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
  """Makes a call while `error` is being raised; logs an error of the call.

  The first error must remain: after Preempted, for instance, a launcher starts
  the run again.
  """
  try:
    call()
  except Exception as another:
    _LOG.warning(
      "after %s, open files and threads could not be closed properly",
      type(error).__name__,
      exc_info=another,
    )
