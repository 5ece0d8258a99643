"""Bad samples: skipped, counted, named in the log, never silently.

Nothing is fatal until a configured share of what was seen is bad. What is no
fault, but not used as it stands, is counted apart.
"""

import collections
import logging
import threading

from lavit_jax.core import errors

_LOG = logging.getLogger(__name__)
_NAMED = 50  # log lines a kind of sample; the rest are only counted
LIMIT_SHARE = 0.05  # of what may be bad, where nothing else is said
_JUDGED = 200  # samples seen before a share means anything


def share_of(data) -> float:
  """The `limit_share` of config.data; the usual one of older configs."""
  return data.get("limit_share", LIMIT_SHARE)


class FaultLog:
  """Counts bad samples of one kind and stops past a share.

  FaultLog("images", 0.05) names each bad image once, and raises DataError
  once more than 5 % of at least 200 images seen were bad. Safe to share
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
      f" {'; '.join(first)}. Mend the data, or raise the allowed share:"
      " config.data.limit_share, or --limit-share of a command that takes"
      " --data."
    )

  def summary(self):
    """One line for a report: "3 of 100 images skipped: a.jpg, b.jpg"."""
    if not self.bad:
      return f"no bad {self.kind} among {self.seen}"
    names = ", ".join(list(self.names)[:5])
    more = f" and {len(self.names) - 5} more" if len(self.names) > 5 else ""
    return f"{self.bad} of {self.seen} {self.kind} skipped: {names}{more}"


class Tally:
  """Counts what is worth knowing and is no fault; never stops a run.

  Tally("documents longer than a row") names the first 50, and says how many
  there were at the 100th, 1,000th, … . Safe to share between threads.
  """

  def __init__(self, kind):
    self.kind, self.seen = kind, 0
    self.reasons = {}  # of the first few
    self._lock = threading.Lock()

  def count(self, name, reason):
    """Counts a sample, and names it if it is one of the first."""
    with self._lock:
      self.seen += 1
      seen, new = self.seen, name not in self.reasons
      if named := new and len(self.reasons) < _NAMED:
        self.reasons[name] = reason
    if named:
      _LOG.info("%s: %s: %s", self.kind, name, reason)
    if seen == 1 or (seen >= 100 and str(seen).strip("0") == "1"):
      _LOG.warning("%s", self.summary())

  def summary(self):
    """One line: "2 documents longer than a row, such as a:1 (… split)"."""
    if not self.seen:
      return f"no {self.kind}"
    name, reason = next(iter(self.reasons.items()))
    return f"{self.seen} {self.kind}, such as {name} ({reason})"
