"""Types and checks of the arguments of class LaVIT."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from lavit_jax.core import errors
from lavit_jax.infer import batches, ranges
from lavit_jax.infer.loading import quantize as int8
from lavit_jax.infer.presets import rules

# A file, here or in an object store; a PIL image; uint8[H, W, 3].
Image = str | os.PathLike | PIL.Image.Image | np.ndarray
Images = Image | Sequence[Image]  # uint8[B, H, W, 3] too
# Text, or parts in order: a str is text, anything else an image.
Prompt = str | Sequence[Image]


def check_load(
  dtype: str, quantize: str | None, manner: str | None, max_batch: int
) -> None:
  """Raises UsageError for an argument of `LaVIT.load` out of its range."""
  allowed: dict[str, tuple[Any, Sequence[Any]]] = {
    "dtype": (dtype, ("float32", "bfloat16")),
    "quantize": (quantize, (None, *int8.MODES)),
    "manner": (manner, (None, *rules.BY_NAME)),
  }
  for name, (value, choices) in allowed.items():
    if value not in choices:
      raise errors.UsageError(
        f"{name}={value!r}: expected {', '.join(map(repr, choices))}."
      )
  ranges.check_integer("max_batch", max_batch, 1, batches.SIZES[-1])


def fields_of(config: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arguments of a call that are fields of a dataclass.

  Args:
    config: the dataclass.
    arguments: `locals()` at the head of a method.
  """
  return {
    field.name: arguments[field.name]
    for field in dataclasses.fields(config)
    if field.name in arguments
  }


def seeds(seed: int | None, parity: bool, count: int) -> np.ndarray | None:
  """Returns int[count], a seed each; None for deterministic selection.

  Raises:
    errors.UsageError: the seed is no integer, or out of range.
  """
  seed = ranges.check_seed(seed, optional=True)
  if seed is None and not parity:
    return None
  return np.arange(count) + (seed or 0)


def per_prompt(
  what: str, value: str | Sequence[Any] | None, count: int
) -> list[Any]:
  """Returns one value for each prompt.

  Args:
    what: a noun for the message.
    value: None or a str for all prompts, or a sequence with one for each.
    count: number of prompts.

  Raises:
    errors.UsageError: the sequence has another length.
  """
  if value is None or isinstance(value, str):
    return [value] * count
  ranges.check_sequence(f"{what}s", value, f"{what}s")
  if len(value) != count:
    raise errors.UsageError(
      f"{len(value)} {what}s for {count} prompts: give one for all (a str), or"
      " one for each."
    )
  return list(value)


def require_text(what: str, value: Any, method: str | None = None) -> None:
  """Checks that a value is a text.

  Args:
    what: a noun for the message.
    value: the argument.
    method: of class LaVIT, which takes images in a prompt.

  Raises:
    errors.UsageError: it is an image or something else.
  """
  if isinstance(value, str):
    return
  hint = f" For images in a prompt use {method}." if method else ""
  raise errors.UsageError(
    f"The {what} is a {type(value).__name__}, but text (str) is expected"
    f" here.{hint}"
  )
