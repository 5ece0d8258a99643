"""Checks the seeds that users give."""

import numbers
from typing import Any

from lavit_jax.core import errors

_MOST = 2**31 - 1  # those of a batch are int32


def check(seed: Any, *, optional: bool = False) -> None:
  """Checks a seed.

  Args:
    seed: what was given.
    optional: None is allowed, where it means that nothing is sampled.

  Raises:
    errors.UsageError: it is another type, or out of range.
  """
  if seed is None and optional:
    return
  integer = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
  if not integer or not 0 <= int(seed) <= _MOST:
    raise errors.UsageError(
      f"seed={seed!r}: expected an integer from 0 to {_MOST}."
    )
