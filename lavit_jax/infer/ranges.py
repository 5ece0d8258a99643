"""Checks numbers that users give: their types and ranges.

A wrong one is refused by name before anything is computed. Inside a program it
would be an error of a library, or no error and another result.
"""

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np

from lavit_jax.core import errors

_MOST_SEED = 2**31 - 1  # those of a batch are int32
_LARGEST = 3e38  # about that of float32


def check_integer(
  name: str, value: Any, least: int, most: int | None = None
) -> int:
  """Returns an integer in a range, of Python's type.

  Args:
    name: of the argument, for the message.
    value: what was given; an integer of NumPy too.
    least: the smallest that is allowed.
    most: the largest; None: there is no limit.

  Raises:
    errors.UsageError: it is another type (a bool, or a float such as 2.0), or
      out of range.
  """
  integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if not integer or value < least or (most is not None and value > most):
    bounds = f"from {least} to {most}"
    if most is None:
      bounds = f"of at least {least}"
    raise errors.UsageError(f"{name}={value!r}: expected an integer {bounds}.")
  return int(value)


def check_number(name: str, value: Any, least: float = -_LARGEST) -> float:
  """Returns a number that float32 can hold, of Python's type.

  Args:
    name: of the argument, for the message.
    value: what was given.
    least: the smallest that is allowed.

  Raises:
    errors.UsageError: it is another type, infinite, NaN, too large or small.
  """
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not real or not least <= value <= _LARGEST:
    bound = "" if least == -_LARGEST else f" of at least {least}"
    raise errors.UsageError(
      f"{name}={value!r}: expected a finite number{bound}."
    )
  return float(value)


def replace(
  config: Any, check: Callable[..., Any], name: str, *bounds: Any
) -> None:
  """Replaces a field of a frozen dataclass by what its check returns.

  Args:
    config: the dataclass, in its `__post_init__`.
    check: `check_integer` or `check_number`.
    name: of the field.
    *bounds: of the check.

  Raises:
    errors.UsageError: see the check.
  """
  value = check(name, getattr(config, name), *bounds)
  object.__setattr__(config, name, value)


def check_seed(seed: Any, *, optional: bool = False) -> Any:
  """Returns a seed as a Python integer, or None.

  Args:
    seed: what was given.
    optional: None is allowed, where it means that nothing is sampled.

  Raises:
    errors.UsageError: it is another type, or out of range.
  """
  if seed is None and optional:
    return None
  return check_integer("seed", seed, 0, _MOST_SEED)


def check_codes(codes: Any) -> None:
  """Checks that visual tokens are a sequence of integers for each image.

  Args:
    codes: int[k] for each image; whether they are of the vocabulary, and not
      too many, is checked where they are padded.

  Raises:
    errors.UsageError: they are no sequence, the codes of one image alone, or no
      integers of int32.
  """
  check_sequence("codes", codes, "int[k] for each image")
  for number, row in enumerate(codes):
    try:
      array = np.asarray(row)
    except ValueError:  # rows of several lengths
      array = np.array(0.5)
    integers = np.issubdtype(array.dtype, np.integer) or not array.size
    if array.ndim != 1 or not integers or (array > _MOST_SEED).any():
      raise errors.UsageError(
        f"codes[{number}] is {row!r:.60}: expected int[k], the codes of one"
        " image. Those of a single image go into a list: [codes]."
      )


def check_sequence(name: str, value: Any, of: str) -> None:
  """Checks that a value is a list or another sequence, but no str.

  Args:
    name: of the argument, for the message.
    value: what was given.
    of: what it is to hold, for the message.

  Raises:
    errors.UsageError: it is a str, whose letters would be taken for its parts,
      or has no length.
  """
  if isinstance(value, str) or not hasattr(value, "__len__"):
    raise errors.UsageError(
      f"{name} is {value!r:.60}: expected a list of {of}."
    )
