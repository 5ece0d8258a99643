"""Reads the fields of diffusers' config files, every one of them accounted for.

A field is used, or known to be at a value that is supported, or an error that
names it; see `diffusers_config.py` for the fields themselves.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lavit_jax.core import errors

_LARGEST = 2**31 - 1
ANY = object()  # every value of a field will do


class File:
  """The fields of a config.json; `made` raises all that was wrong.

  A method that finds a wrong value notes it and gives one that will do until
  then.
  """

  def __init__(
    self,
    label: str,
    fields: Mapping[str, Any],
    kind: str,
    used: Mapping[str, Any],
    fixed: Mapping[str, Any],
  ):
    """Notes unknown fields, and fixed ones at other values.

    Args:
      label: how messages name the file.
      fields: its content; names that begin with an underscore only tell
        which class and version wrote it.
      kind: the class.
      used: fields that are read, with the defaults of those the file lacks.
      fixed: fields that must be at one of a tuple of values (lists: in each
        entry), or at any, with ANY.
    """
    self._label = label
    self._problems: list[str] = []
    given = {n: v for n, v in fields.items() if not n.startswith("_")}
    self._fields = {**used, **given}
    if fields.get("_class_name", kind) != kind:
      self._problems.append(
        f"_class_name is {fields['_class_name']!r}, expected {kind!r}"
      )
    for name, value in given.items():
      if name in fixed:
        self._check_fixed(name, value, fixed[name])
      elif name not in used:
        near = difflib.get_close_matches(name, (*used, *fixed), 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        self._problems.append(f"{name} is no field of {kind}{hint}")

  def _check_fixed(self, name, value, allowed):
    if allowed is ANY:
      return
    values = value if isinstance(value, list | tuple) and value else [value]
    if any(v not in allowed for v in values):
      self.wrong(name, " or ".join(repr(a) for a in allowed))

  def value(self, name: str) -> Any:
    """A field as it is, or diffusers' default."""
    return self._fields[name]

  def wrong(self, name: str, expected: str) -> None:
    """Notes that a field has a value that cannot be."""
    self._problems.append(
      f"{name} is {self.value(name)!r}, expected {expected}"
    )

  def made(self, make):
    """What `make` makes, if nothing was wrong."""
    found = "; ".join(self._problems)
    if not found:
      try:
        return make()
      except errors.ConfigError as e:
        found = str(e)
    raise errors.CheckpointError(
      f"{self._label} describes a network that cannot be made here: {found}."
      " Check that the file belongs to Stable Diffusion 1 or 2, SDXL, or a"
      " network of their kind."
    )

  def whole(self, name: str) -> int:
    """A whole number, at least 1."""
    value = self.value(name)
    if is_whole(value):
      return value
    self.wrong(name, "a positive whole number")
    return 1

  def real(self, name: str, least: float | None = None) -> float:
    """A number above 0, or at least `least`."""
    value = self.value(name)
    if is_number(value) and (value > 0 if least is None else value >= least):
      return value
    limit = "above 0" if least is None else f"of at least {least}"
    self.wrong(name, f"a number {limit}")
    return 1.0

  def flag(self, name: str) -> bool:
    """A bool."""
    value = self.value(name)
    if not isinstance(value, bool):
      self.wrong(name, "true or false")
    return bool(value)

  def numbers(self, name: str) -> tuple[int, ...]:
    """A list of whole numbers, at least one."""
    value = self.value(name)
    if _is_list(value, is_whole):
      return tuple(value)
    self.wrong(name, "a list of positive whole numbers")
    return (1,)

  def words(self, name: str) -> list[str]:
    """A list of strings, at least one."""
    value = self.value(name)
    if _is_list(value, lambda v: isinstance(v, str)):
      return list(value)
    self.wrong(name, "a list of names")
    return []

  def per_level(self, name: str, levels: int) -> tuple[int, ...]:
    """One number for all levels or a list, as a number a level."""
    if is_whole(self.value(name)):
      return (self.value(name),) * levels
    found = self.numbers(name)
    if len(found) == levels:
      return found
    self.wrong(name, f"a number, or {levels} of them, one a level")
    return (1,) * levels


def is_number(value: Any) -> bool:
  """Whether a value of a JSON file is a number that a float can be."""
  if not isinstance(value, int | float) or isinstance(value, bool):
    return False
  try:
    return math.isfinite(value)
  except OverflowError:  # a whole number of hundreds of digits
    return False


def is_whole(value: Any) -> bool:
  """Whether it is a whole number from 1 that an array's size can be."""
  is_int = isinstance(value, int) and not isinstance(value, bool)
  return is_int and 0 < value <= _LARGEST


def _is_list(value: Any, fits) -> bool:
  is_list = isinstance(value, Sequence) and not isinstance(value, str)
  return bool(is_list and value and all(fits(v) for v in value))
