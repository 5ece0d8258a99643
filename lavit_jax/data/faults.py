"""Bad samples: skipped, counted, named in the log, never silently.

Nothing is fatal until a configured share of what was seen is bad.
"""

import collections
import logging
import threading

from lavit_jax import errors

_LOG = logging.getLogger(__name__)
_NAMED = 50  # log lines a kind of sample; the rest are only counted
_JUDGED = 200  # samples seen before a share means anything


class FaultLog:
  """Counts bad samples of one kind and stops past a share.

  FaultLog("pictures", 0.05) names each bad picture once, and raises DataError
  once more than 5 % of at least 200 pictures seen were bad. Safe to share
  between threads.
  """

  def __init__(self, kind="samples", limit_share=0.05):
    if not 0 <= limit_share <= 1:
      raise errors.ConfigError(
        f"limit_share={limit_share}: the share of bad {kind} that stops a run"
        " lies between 0 and 1; 1 never stops."
      )
    self.kind, self.limit_share = kind, limit_share
    self.seen, self.bad = 0, 0
    self.names = collections.Counter()
    self.reasons = {}
    self._lock = threading.Lock()

  def good(self, count=1):
    """Counts samples that were fine."""
    with self._lock:
      self.seen += count

  def fault(self, name, reason):
    """Counts a bad sample, names it the first time, stops past the share."""
    reason = str(reason)
    with self._lock:
      self.seen += 1
      self.bad += 1
      self.names[name] += 1
      first = self.names[name] == 1
      if first:
        self.reasons[name] = reason
    if first and len(self.names) <= _NAMED:
      _LOG.warning("skipped from %s: %s: %s", self.kind, name, reason)
    self.check(least=_JUDGED)

  def check(self, least=1):
    """Raises DataError if the share is passed; `least` samples are needed."""
    if self.seen < least or self.bad <= self.limit_share * self.seen:
      return
    first = [f"{name} ({self.reasons[name]})" for name in list(self.names)[:3]]
    raise errors.DataError(
      f"{self.bad} of {self.seen} {self.kind} are unusable, more than the"
      f" allowed share of {self.limit_share:g}; for example"
      f" {'; '.join(first)}. Mend the data, or raise the allowed share."
    )

  def summary(self):
    """One line for a report: "3 of 100 pictures skipped: a.jpg, b.jpg"."""
    if not self.bad:
      return f"no bad {self.kind} among {self.seen}"
    names = ", ".join(list(self.names)[:5])
    more = f" and {len(self.names) - 5} more" if len(self.names) > 5 else ""
    return f"{self.bad} of {self.seen} {self.kind} skipped: {names}{more}"
