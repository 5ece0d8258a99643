"""Fields of diffusers' network configs, none of them ignored.

A field is used, or has a supported value, or is reported by name; `config.py`
lists the fields themselves.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lavit_jax.core import errors
from lavit_jax.port.formats import config_fields

_Config = TypeVar("_Config")


class NetworkFields(config_fields.Fields):
  """The fields of a config.json; `build` raises all problems at once."""

  def __init__(
    self,
    label: str,
    fields: Mapping[str, Any],
    class_name: str,
    used: Mapping[str, Any],
    fixed: Mapping[str, Any],
  ):
    """Records unknown fields and fixed fields at other values.

    Args:
      label: how messages name the file.
      fields: its content; names that begin with an underscore only say which
        class and version wrote it.
      class_name: diffusers' class of the network.
      used: fields that are read, with diffusers' defaults.
      fixed: fields that must have one of a tuple of values (lists: in each
        entry), or may have any (`config_fields.ANY`).
    """
    content = {n: v for n, v in fields.items() if not n.startswith("_")}
    super().__init__(content, used)
    self._label = label
    if fields.get("_class_name", class_name) != class_name:
      self.problems.append(
        f"_class_name is {fields['_class_name']!r}, expected {class_name!r}"
      )
    for name in content:
      if name in fixed:
        self.check_fixed(name, fixed[name])
      elif name not in used:
        near = difflib.get_close_matches(name, (*used, *fixed), 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        self.problems.append(f"{name} is no field of {class_name}{hint}")

  def positive_ints(self, name: str) -> tuple[int, ...]:
    """Returns a list of whole numbers of at least 1, not empty."""
    value = self.value(name)
    if _is_list(value, config_fields.is_positive_int):
      return tuple(value)
    self.wrong(name, "a list of whole numbers of at least 1")
    return (1,)

  def strings(self, name: str) -> list[str]:
    """Returns a list of strings, not empty."""
    value = self.value(name)
    if _is_list(value, lambda v: isinstance(v, str)):
      return list(value)
    self.wrong(name, "a list of names")
    return []

  def per_level(self, name: str, levels: int) -> tuple[int, ...]:
    """Returns one number a level, from a list or from one number for all."""
    if config_fields.is_positive_int(self.value(name)):
      return (self.value(name),) * levels
    numbers = self.positive_ints(name)
    if len(numbers) == levels:
      return numbers
    self.wrong(name, f"one number, or a list of {levels}, one a level")
    return (1,) * levels

  def build(self, make: Callable[[], _Config]) -> _Config:
    """Returns `make()`.

    Raises:
      errors.CheckpointError: a field was wrong, or `make` raised ConfigError.
    """
    message = "; ".join(self.problems)
    if not message:
      try:
        return make()
      except errors.ConfigError as e:
        message = str(e)
    raise errors.CheckpointError(
      f"{self._label} describes a network that lavit_jax does not implement:"
      f" {message}. Check that the file belongs to Stable Diffusion 1 or 2,"
      " SDXL, or a network of the same kind."
    )


def _is_list(value: Any, is_valid: Callable[[Any], bool]) -> bool:
  is_list = isinstance(value, Sequence) and not isinstance(value, str)
  return bool(is_list and value and all(is_valid(v) for v in value))
