"""Whether what is stored is what a run takes it for.

Weights mean something only under the settings that they were trained with. Of
two descriptions of one thing every field that differs is found, and named with
both values and the way out; which are meant, `config.accept` says.
"""

import dataclasses
import logging
from collections.abc import Collection, Mapping
from typing import Any

from lavit_jax.core import errors

_LOG = logging.getLogger(__name__)
# How a network is computed; its weights mean the same.
COMPUTED = ("dtype", "remat", "unroll", "scan", "matmul")


@dataclasses.dataclass(frozen=True)
class Difference:
  """A field or a fingerprint that is not the same on both sides.

  Attributes:
    name: as `config.accept` names it.
    theirs: the stored value.
    ours: this run's.
    way_out: what to do about it, a clause such as "give --config.x=1".
  """

  name: str
  theirs: Any
  ours: Any
  way_out: str

  def __str__(self):
    return f"{self.name} is {self.theirs!r} there, {self.ours!r} here"


def fields(
  theirs: Any, ours: Any, prefix: str, free: Collection[str] = ()
) -> list[Difference]:
  """Fields of two configs of one class that differ.

  Args:
    theirs: a dataclass, as stored.
    ours: a dataclass of the same class, as of this run.
    prefix: of the fields in a run's config, such as "model.llm.".
    free: names of fields that may differ, beside `COMPUTED`.
  """
  found = _fields(dataclasses.asdict(theirs), dataclasses.asdict(ours), prefix)
  may = {prefix + name for name in (*COMPUTED, *free)}
  return [
    Difference(name, old, new, f"give --config.{name}={old}")
    for name, (old, new) in found.items()
    if name not in may
  ]


def _fields(theirs, ours, prefix):
  """{dotted name: (theirs, ours)} where they differ."""
  found = {}
  for key in ours:
    old, new = theirs[key], ours[key]
    if isinstance(old, Mapping) and isinstance(new, Mapping):
      found |= _fields(old, new, f"{prefix}{key}.")
    elif old != new:
      found[prefix + key] = old, new
  return found


def prints(
  theirs: Mapping[str, str], ours: Mapping[str, str], way_out: str
) -> list[Difference]:
  """Fingerprints that differ; what only one side has is not known to."""
  return [
    Difference(name, theirs[name], ours[name], way_out)
    for name in ours
    if name in theirs and theirs[name] != ours[name]
  ]


def accepted(config) -> frozenset[str]:
  """The names in `config.accept`, of differences that are meant.

  Raises:
    errors.ConfigError: it is no text.
  """
  told = config.get("accept", "")
  if not isinstance(told, str):
    raise errors.ConfigError(
      f"config.accept={told!r}: expected names of differences, with commas"
      " between them, such as --config.accept=train_data,encoder."
    )
  return frozenset(name.strip() for name in told.split(",") if name.strip())


def settle(
  differences: Collection[Difference],
  accept: Collection[str],
  *,
  what: str,
  error: type[errors.LavitError] = errors.ConfigError,
) -> None:
  """Raises for differences, but for those that are accepted: a warning.

  Args:
    differences: what `fields` or `prints` gave.
    accept: see `accepted`.
    what: begins the message, such as "The llm of start_from=DIR".
    error: of what kind the error is.
  """
  for one in differences:
    if one.name in accept:
      _LOG.warning("%s: %s, as config.accept allows", what, one)
  wrong = [one for one in differences if one.name not in accept]
  if wrong:
    ways = " and ".join(dict.fromkeys(one.way_out for one in wrong))
    names = ",".join(sorted({*accept, *(one.name for one in wrong)}))
    raise error(
      f"{what} does not fit this run: {'; '.join(map(str, wrong))}. Either"
      f" {ways}; or, if the difference is meant, --config.accept={names}."
    )
