"""Fields of the config.json files of published networks, each one checked.

`Fields` reads values of a required type and collects every problem of a file,
so that one error can list all of them.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

_MAX_INT = 2**31 - 1
ABSENT = object()  # value of a field that has neither a value nor a default
ANY = object()  # the allowed values of a field that may have any


class Fields:
  """The fields of one file; `problems` collects everything wrong with them.

  A method that finds a wrong value records the problem and returns a valid
  placeholder, so that reading continues with the next field.
  """

  def __init__(
    self,
    content: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
  ):
    """Stores the content.

    Args:
      content: the JSON object of the file.
      defaults: values of fields that the file may omit.
    """
    self.problems: list[str] = []
    self._content = {**(defaults or {}), **content}

  def value(self, name: str) -> Any:
    """Returns a field as it is, its default, or ABSENT.

    Args:
      name: of the field; "outer.inner" for a field of a nested object.
    """
    if name in self._content:
      return self._content[name]
    outer, _, inner = name.partition(".")
    value = self._content.get(outer, ABSENT)
    return value.get(inner, ABSENT) if inner else value

  def wrong(self, name: str, expected: str) -> None:
    """Records that a field has a value that is not supported."""
    self.problems.append(
      f"{name} is {shown(self.value(name))}, expected {expected}"
    )

  def check_fixed(self, name: str, allowed: Any) -> None:
    """Checks that a field has one of the allowed values, if it is there.

    Args:
      name: of the field. Every entry of a list is checked.
      allowed: a tuple of values, or ANY.
    """
    value = self.value(name)
    if value is ABSENT or allowed is ANY:
      return
    values = value if isinstance(value, list | tuple) and value else [value]
    if any(v not in allowed for v in values):
      options = " or ".join(shown(a) for a in allowed if a is not None)
      self.wrong(name, options or "null")

  def positive_int(self, name: str) -> int:
    """Returns a whole number of at least 1."""
    value = self.value(name)
    if is_positive_int(value):
      return value
    self.wrong(name, "a whole number of at least 1")
    return 1

  def optional_int(self, name: str) -> int | None:
    """Returns a whole number of at least 1, or None where the file has null."""
    return None if self.value(name) is None else self.positive_int(name)

  def positive_number(self, name: str, least: float | None = None) -> float:
    """Returns a number above 0, or of at least `least` where that is given."""
    value = self.value(name)
    if is_number(value) and (value > 0 if least is None else value >= least):
      return value
    limit = "above 0" if least is None else f"of at least {least}"
    self.wrong(name, f"a number {limit}")
    return 1.0

  def boolean(self, name: str) -> bool:
    """Returns true or false."""
    value = self.value(name)
    if not isinstance(value, bool):
      self.wrong(name, "true or false")
    return bool(value)


def shown(value: Any) -> str:
  """Returns a value as messages show it: JSON's constants, at most 80 chars."""
  if value is ABSENT:
    return "missing"
  if value is None or isinstance(value, bool):
    return {None: "null", True: "true", False: "false"}[value]
  return re.sub(r"\s+", " ", repr(value))[:80]


def is_number(value: Any) -> bool:
  """Returns whether a JSON value is a finite number, not a bool."""
  if not isinstance(value, int | float) or isinstance(value, bool):
    return False
  try:
    return math.isfinite(value)
  except OverflowError:  # an integer of hundreds of digits
    return False


def is_positive_int(value: Any) -> bool:
  """Returns whether a JSON value is an integer that can be an array's size."""
  is_int = isinstance(value, int) and not isinstance(value, bool)
  return is_int and 0 < value <= _MAX_INT
