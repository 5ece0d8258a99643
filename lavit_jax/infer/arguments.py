"""What calls of class LaVIT are given, checked."""

import numpy as np

from lavit_jax.core import errors
from lavit_jax.infer import batches
from lavit_jax.infer.loading import quantize as int8
from lavit_jax.infer.presets import rules


def check_options(dtype, quantize, manner, max_batch):
  """UsageError for a bad option of `LaVIT.load`."""
  allowed = {
    "dtype": (dtype, ("float32", "bfloat16")),
    "quantize": (quantize, (None, *int8.MODES)),
    "manner": (manner, (None, *rules.BY_NAME)),
    "max_batch": (max_batch, range(1, batches.SIZES[-1] + 1)),
  }
  for name, (given, known) in allowed.items():
    if given not in known:
      raise errors.UsageError(
        f"{name}={given!r}: expected {', '.join(map(repr, known))}."
        if len(known) < 5
        else f"{name}={given!r}: expected {known[0]} to {known[-1]}."
      )


def seeds(seed, parity, count):
  """int[n], one for each, or None for the deterministic selection."""
  if seed is None and not parity:
    return None
  return np.arange(count) + (seed or 0)


def one_each(what, given, count):
  """A list of `count`, from None, one for all or one for each."""
  if given is None or isinstance(given, str):
    return [given] * count
  if len(given) != count:
    raise errors.UsageError(
      f"{len(given)} {what}s for {count} prompts: give one for all (a str), or"
      " one for each."
    )
  return list(given)


def require_text(what, given, instead=None):
  """UsageError where an image or something else stands for a text."""
  if isinstance(given, str):
    return
  hint = f" Images in a prompt go through {instead}." if instead else ""
  raise errors.UsageError(
    f"The {what} is a {type(given).__name__}, but text (str) is expected"
    f" here.{hint}"
  )
