"""How loaded networks compute: their dtype, and their layers in one loop.

The `unroll` of a part is how it was trained. On a CPU inference runs the
layers in a loop that is not unrolled: the model `tiny` then compiles in three
quarters of the time, runs as fast, and gives the same numbers to the bit.
"""

import dataclasses
from typing import Any, TypeVar

import jax

from lavit_jax.models.tokenizer import tokenizer

_Config = TypeVar("_Config")


def of_network(
  config: _Config, dtype: str, *, one_loop: bool = False
) -> _Config:
  """Returns the config of one network for inference.

  Args:
    config: a dataclass with `dtype`, and `unroll` if it has layers in a scan.
    dtype: of the computation.
    one_loop: leave nothing unrolled on any backend. int8 weights need it:
      unrolled layers would all be cast back to floats at once.
  """
  changes: dict[str, str | int] = {"dtype": dtype}
  if hasattr(config, "unroll") and (one_loop or _loops_are_free()):
    changes["unroll"] = 1
  return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def of_tokenizer(
  config: tokenizer.TokenizerConfig, dtype: str
) -> tokenizer.TokenizerConfig:
  """Returns the config of a visual tokenizer, each network `of_network`."""
  parts: dict[str, Any] = {
    field.name: of_network(part, dtype)
    for field in dataclasses.fields(config)
    if dataclasses.is_dataclass(part := getattr(config, field.name))
  }
  return dataclasses.replace(config, **parts)


def _loops_are_free() -> bool:
  return jax.default_backend() == "cpu"
