"""Values of a config that no run can mean, refused before anything is made."""

import dataclasses
import math
import numbers
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lavit_jax.core import errors

_LARGEST = sys.float_info.max


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `low` to `high`, both among them unless they are open."""

  low: float
  high: float = _LARGEST
  whole: bool = False
  open_low: bool = False
  open_high: bool = False

  def __str__(self):
    kind = "an integer" if self.whole else "a number"
    lowest = f"more than {self.low}" if self.open_low else f"{self.low}"
    if self.high >= _LARGEST:
      return f"{kind} {lowest}" + ("" if self.open_low else " or more")
    highest = f"less than {self.high}" if self.open_high else f"{self.high}"
    return f"{kind} from {lowest} to {highest}"

  def __contains__(self, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
      return False
    # NumPy's compare in their own precision, and Python's integers exactly.
    value = value if isinstance(value, int) else float(value)
    if self.whole and isinstance(value, float) and not value.is_integer():
      return False
    above = value > self.low if self.open_low else value >= self.low
    return above and (
      value < self.high if self.open_high else value <= self.high
    )


_SHARE = Range(0, 1)
_COUNT = Range(1, whole=True)
_RANGES = {
  r"(data\.)?seed": Range(0, 2**32 - 1, whole=True),
  r"batch_size|accumulate|(log|eval|checkpoint)\.every|eval\.batches": _COUNT,
  r"data\.(image_size|text_vocab|length|slots|window)": _COUNT,
  r"data\.text_length": Range(2, whole=True),  # a word and the end of text
  r"data\.threads": Range(0, whole=True),
  r"data\.mixture\.\w+": Range(0),
  r"optimizer\.(b1|b2)": Range(0, 1, open_high=True),
  r"optimizer\.(weight_decay|groups\.\w+)": Range(0),
  r"optimizer\.clip_norm": Range(0, math.inf, open_low=True),  # inf: never
  r"phases\.\w+\.(steps|warmup)": Range(0, whole=True),
  r"phases\.\w+\.(lr|end_factor|min_snr)": Range(0),
  r"phases\.\w+\.(mask_share|\w+_dropout|ema_decay)": _SHARE,
  r"model\.(\w+\.)*(width|depth|num_heads|num_kv_heads|mlp_dim|max_len"
  r"|patch_size|image_size|embed_dim|code_dim|num_codes|unroll)": _COUNT,
}


def check(config) -> None:
  """Raises ConfigError where a field of a run's config cannot be meant.

  Every field that is NaN, and those of `_RANGES`; what only goes with other
  fields is checked where they are used.

  Args:
    config: an `ml_collections.ConfigDict`.
  """
  wrong = [*_wrong(config.to_dict())]
  if wrong:
    raise errors.ConfigError(f"{'; '.join(wrong[:6])}.")


def _wrong(fields: Mapping[str, Any]) -> Iterator[str]:
  """What is given and what was expected, of each field that is wrong."""
  for name, value in _leaves(fields, ""):
    if isinstance(value, numbers.Real) and math.isnan(value):
      yield f"config.{name} is not a number (nan)"
      continue
    for pattern, among in _RANGES.items():
      if re.fullmatch(pattern, name) and value not in among:
        yield f"config.{name}={value!r}: expected {among}"


def _leaves(fields, prefix) -> Iterator[tuple[str, Any]]:
  """Dotted names and values; each value of a tuple."""
  for key, value in fields.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      for one in value if isinstance(value, (tuple, list)) else (value,):
        yield f"{prefix}{key}", one
