"""Checks numbers that users give: their types and ranges.

A wrong one is refused by name before anything is computed. Inside a program it
would be an error of a library, or no error and another result.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from lavit_jax.core import errors

_MOST_SEED = 2**31 - 1  # those of a batch are int32


def check_integer(
  name: str, value: Any, least: int, most: int | None = None
) -> None:
  """Checks that a value is an integer in a range.

  Args:
    name: of the argument, for the message.
    value: what was given.
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


def check_number(name: str, value: Any, least: float = -math.inf) -> None:
  """Checks that a value is a finite number.

  Args:
    name: of the argument, for the message.
    value: what was given.
    least: the smallest that is allowed.

  Raises:
    errors.UsageError: it is another type, infinite, NaN or too small.
  """
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not real or not math.isfinite(value) or value < least:
    bound = "" if least == -math.inf else f" of at least {least}"
    raise errors.UsageError(
      f"{name}={value!r}: expected a finite number{bound}."
    )


def check_seed(seed: Any, *, optional: bool = False) -> None:
  """Checks a seed.

  Args:
    seed: what was given.
    optional: None is allowed, where it means that nothing is sampled.

  Raises:
    errors.UsageError: it is another type, or out of range.
  """
  if seed is not None or not optional:
    check_integer("seed", seed, 0, _MOST_SEED)


def check_codes(codes: Sequence[Any]) -> None:
  """Checks that visual tokens are a sequence of integers for each image.

  Args:
    codes: int[k] for each image; whether they are of the vocabulary, and not
      too many, is checked where they are padded.

  Raises:
    errors.UsageError: they are the codes of one image alone, or no integers.
  """
  for number, row in enumerate(codes):
    array = np.asarray(row)
    integers = np.issubdtype(array.dtype, np.integer) or not array.size
    if array.ndim != 1 or not integers:
      raise errors.UsageError(
        f"codes[{number}] is {row!r:.60}: expected int[k], the codes of one"
        " image. Those of a single image go into a list: [codes]."
      )
