"""Compares stored settings and fingerprints with those of a run.

Weights are meaningful only with the settings that they were trained with. Each
difference is reported with both values and a way out; `config.accept` names
those that are intended.
"""

import dataclasses
import logging
from collections.abc import Collection, Mapping
from typing import Any

from lavit_jax.core import errors

_LOG = logging.getLogger(__name__)
# Fields that change how a network is computed, not the meaning of its weights.
COMPUTED = ("dtype", "remat", "unroll", "scan", "matmul")


@dataclasses.dataclass(frozen=True)
class Difference:
  """A field or a fingerprint that differs between what is stored and a run.

  Attributes:
    name: as `config.accept` names it.
    stored: the stored value.
    current: the value of this run.
    way_out: what to do about it, a clause such as "give --config.x=1".
  """

  name: str
  stored: Any
  current: Any
  way_out: str

  def __str__(self) -> str:
    return f"{self.name} is {self.stored!r} there, {self.current!r} here"


def fields(
  stored: Any, current: Any, prefix: str, free: Collection[str] = ()
) -> list[Difference]:
  """Returns the fields in which two configs of one class differ.

  Args:
    stored: a dataclass, as stored.
    current: a dataclass of the same class, of this run.
    prefix: of the fields in a run's config, such as "model.llm.".
    free: names of fields that may differ, besides `COMPUTED`.
  """
  differing = _differing(
    dataclasses.asdict(stored), dataclasses.asdict(current), prefix
  )
  allowed = {prefix + name for name in (*COMPUTED, *free)}
  return [
    Difference(name, old, new, f"give --config.{name}={old}")
    for name, (old, new) in differing.items()
    if name not in allowed
  ]


def _differing(stored, current, prefix):
  """Returns {dotted name: (stored, current)} of values that differ."""
  differing = {}
  for key in current:
    old, new = stored[key], current[key]
    if isinstance(old, Mapping) and isinstance(new, Mapping):
      differing |= _differing(old, new, f"{prefix}{key}.")
    elif old != new:
      differing[prefix + key] = old, new
  return differing


def fingerprints(
  stored: Mapping[str, str], current: Mapping[str, str], way_out: str
) -> list[Difference]:
  """Returns the fingerprints that differ.

  Args:
    stored: fingerprints by name.
    current: those of this run. Names on one side only are not compared.
    way_out: see `Difference`.
  """
  return [
    Difference(name, stored[name], current[name], way_out)
    for name in current
    if name in stored and stored[name] != current[name]
  ]


def accepted(config: Mapping[str, Any]) -> frozenset[str]:
  """Returns the names in `config.accept`, of intended differences.

  Raises:
    errors.ConfigError: `config.accept` is not a string.
  """
  accept = config.get("accept", "")
  if not isinstance(accept, str):
    raise errors.ConfigError(
      f"config.accept={accept!r}: expected names of differences separated by"
      " commas, such as --config.accept=train_data,encoder."
    )
  return frozenset(name.strip() for name in accept.split(",") if name.strip())


def settle(
  differences: Collection[Difference],
  accept: Collection[str],
  *,
  what: str,
  error: type[errors.LavitError] = errors.ConfigError,
) -> None:
  """Raises an error for differences; logs those that are accepted.

  Args:
    differences: of `fields` or `fingerprints`.
    accept: names of intended differences, see `accepted`.
    what: subject of the message, such as "The llm of start_from=DIR".
    error: class of the error.

  Raises:
    error: there are differences that are not accepted.
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
      f" {ways}; or, if the difference is intended, --config.accept={names}."
    )
