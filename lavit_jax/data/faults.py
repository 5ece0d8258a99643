"""Counts and logs bad samples; stops a run when there are too many.

Nothing is fatal until a configured share of the samples is bad. `Tally` counts
samples that are not bad, but are not used as they are.
"""

import collections
import logging
import threading
from collections.abc import Mapping
from typing import Any

from lavit_jax.core import errors

_LOG = logging.getLogger(__name__)
_MAX_NAMED = 50  # samples of a kind that are logged; the rest are only counted
LIMIT_SHARE = 0.05  # default share of samples that may be bad
_MIN_SAMPLES = 200  # below this a share of bad samples means little


def share_of(data: Mapping[str, Any]) -> float:
  """Returns `limit_share` of config.data; the default for older configs."""
  return data.get("limit_share", LIMIT_SHARE)


class FaultLog:
  """Counts bad samples of one kind and stops the run above a share.

  FaultLog("images", 0.05) logs each bad image once, and raises DataError once
  more than 5 % of at least 200 images are bad. Safe to share between threads.

  Attributes:
    seen: number of samples, good and bad.
    bad: number of bad samples.
    names: how often each bad sample occurred, by name.
    reasons: why each bad sample is bad, by name.
  """

  def __init__(
    self, kind: str = "samples", limit_share: float = LIMIT_SHARE
  ) -> None:
    """Begins to count.

    Args:
      kind: name of the samples in messages, in the plural.
      limit_share: share of bad samples above which the run stops; 1 never
        stops.

    Raises:
      errors.ConfigError: the share is not between 0 and 1.
    """
    if not 0 <= limit_share <= 1:
      raise errors.ConfigError(
        f"limit_share={limit_share}: the share of bad {kind} that stops a run"
        " lies between 0 and 1; 1 never stops."
      )
    self.kind, self.limit_share = kind, limit_share
    self.seen, self.bad = 0, 0
    self.names: collections.Counter[str] = collections.Counter()
    self.reasons: dict[str, str] = {}
    self._lock = threading.Lock()

  def good(self, count: int = 1) -> None:
    """Counts good samples."""
    with self._lock:
      self.seen += count

  def fault(self, name: str, reason: object) -> None:
    """Counts a bad sample, and logs it the first time.

    Args:
      name: of the sample.
      reason: why it is bad, a text or an exception.

    Raises:
      errors.DataError: too many samples are bad.
    """
    reason = str(reason)
    with self._lock:
      self.seen += 1
      self.bad += 1
      self.names[name] += 1
      first = self.names[name] == 1
      if first:
        self.reasons[name] = reason
    if first and len(self.names) <= _MAX_NAMED:
      _LOG.warning("skipped from %s: %s: %s", self.kind, name, reason)
    self.check(least=_MIN_SAMPLES)

  def fault_all(self, reasons: Mapping[str, str], count: int) -> None:
    """Counts bad samples that were found together, and logs them in one line.

    Raises nothing: `check` does.

    Args:
      reasons: why the first ones are bad, by name; at least one.
      count: how many they are.
    """
    with self._lock:
      self.seen += count
      self.bad += count
      self.names.update(reasons.keys())
      self.reasons.update(reasons)
    name, reason = next(iter(reasons.items()))
    _LOG.warning(
      "skipped %d from %s, such as %s: %s", count, self.kind, name, reason
    )

  def check(self, least: int = 1) -> None:
    """Raises DataError if too large a share of the samples is bad.

    Args:
      least: number of samples below which nothing is raised.
    """
    if self.seen < least or self.bad <= self.limit_share * self.seen:
      return
    first = [f"{name} ({self.reasons[name]})" for name in list(self.names)[:3]]
    raise errors.DataError(
      f"{self.bad} of {self.seen} {self.kind} are unusable, more than the"
      f" allowed share of {self.limit_share:g}; for example"
      f" {'; '.join(first)}. Correct the data, or raise the allowed share:"
      " config.data.limit_share, or --limit-share of a command that takes"
      " --data."
    )

  def summary(self) -> str:
    """Returns one line: "3 of 100 images skipped: a.jpg, b.jpg, c.jpg"."""
    if not self.bad:
      return f"no bad {self.kind} among {self.seen}"
    names = ", ".join(list(self.names)[:5])
    more = f" and {len(self.names) - 5} more" if len(self.names) > 5 else ""
    return f"{self.bad} of {self.seen} {self.kind} skipped: {names}{more}"


class Tally:
  """Counts samples that are worth knowing of and not bad; never stops a run.

  Tally("documents longer than a row") logs the first 50 by name, and the total
  at the 1st, 100th, 1,000th, … sample. Safe to share between threads.

  Attributes:
    seen: number of samples counted.
    reasons: what was done to each of the first samples, by name.
  """

  def __init__(self, kind: str) -> None:
    """Begins to count samples, called `kind` in messages, in the plural."""
    self.kind, self.seen = kind, 0
    self.reasons: dict[str, str] = {}
    self._lock = threading.Lock()

  def count(self, name: str, reason: str) -> None:
    """Counts a sample, and logs it if it is one of the first."""
    with self._lock:
      self.seen += 1
      total, new = self.seen, name not in self.reasons
      if named := new and len(self.reasons) < _MAX_NAMED:
        self.reasons[name] = reason
    if named:
      _LOG.info("%s: %s: %s", self.kind, name, reason)
    if total == 1 or (total >= 100 and str(total).strip("0") == "1"):
      _LOG.warning("%s", self.summary())

  def summary(self) -> str:
    """Returns one line: "2 long documents, such as a:1 (split into 3)"."""
    if not self.seen:
      return f"no {self.kind}"
    name, reason = next(iter(self.reasons.items()))
    return f"{self.seen} {self.kind}, such as {name} ({reason})"
