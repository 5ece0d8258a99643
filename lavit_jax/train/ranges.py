"""Refuses values of a config that no run can use, before anything starts."""

import dataclasses
import math
import numbers
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from lavit_jax.core import errors

_LARGEST = sys.float_info.max


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `low` to `high`; an open end is excluded.

  Attributes:
    low: the lowest number.
    high: the highest number.
    whole: whether only integers are in the range.
    open_low: whether `low` itself is excluded.
    open_high: whether `high` itself is excluded.
  """

  low: float
  high: float = _LARGEST
  whole: bool = False
  open_low: bool = False
  open_high: bool = False

  def __str__(self) -> str:
    """Describes the range for an error message."""
    kind = "an integer" if self.whole else "a number"
    lowest = f"more than {self.low}" if self.open_low else f"{self.low}"
    if self.high >= _LARGEST:
      return f"{kind} {lowest}" + ("" if self.open_low else " or more")
    highest = f"less than {self.high}" if self.open_high else f"{self.high}"
    return f"{kind} from {lowest} to {highest}"

  def __contains__(self, value: object) -> bool:
    """Returns whether a value is a number of the range; bools are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
      return False
    # NumPy's numbers compare in their own precision, Python's ints exactly.
    number = value if isinstance(value, int) else float(value)
    if self.whole and isinstance(number, float) and not number.is_integer():
      return False
    above = number > self.low if self.open_low else number >= self.low
    return above and (
      number < self.high if self.open_high else number <= self.high
    )


_SHARE = Range(0, 1)
_COUNT = Range(1, whole=True)
_RANGES = {
  r"(data\.)?seed": Range(0, 2**32 - 1, whole=True),
  r"batch_size|accumulate|(log|eval|checkpoint)\.every|eval\.batches": _COUNT,
  r"data\.(image_size|text_vocab|length|slots|window)": _COUNT,
  r"data\.text_length": Range(2, whole=True),  # a word and the end of text
  r"data\.threads": Range(0, whole=True),
  r"data\.(sources\.\w+\.)?mixture\.\w+": Range(0),
  r"data\.sources\.\w+\.weight": Range(0),
  r"optimizer\.(b1|b2)": Range(0, 1, open_high=True),
  r"optimizer\.(weight_decay|groups\.\w+)": Range(0),
  r"optimizer\.clip_norm": Range(0, math.inf, open_low=True),  # inf: never
  r"phases\.\w+\.(steps|warmup)": Range(0, whole=True),
  r"phases\.\w+\.(lr|end_factor|min_snr)": Range(0),
  r"phases\.\w+\.(mask_share|\w+_dropout|ema_decay)": _SHARE,
  r"model\.(\w+\.)*(width|depth|num_heads|num_kv_heads|mlp_dim|max_len"
  r"|patch_size|image_size|embed_dim|code_dim|num_codes|unroll)": _COUNT,
}


def check(config: ml_collections.ConfigDict) -> None:
  """Checks the fields of a config each by itself.

  No field may be NaN, and those of `_RANGES` must be in their range. What
  depends on several fields is checked where they are used.

  Args:
    config: of a run.

  Raises:
    errors.ConfigError: a field has a value that it cannot have.
  """
  wrong = [*_wrong(config.to_dict())]
  if wrong:
    raise errors.ConfigError(f"{'; '.join(wrong[:6])}.")


def _wrong(fields: Mapping[str, Any]) -> Iterator[str]:
  """Yields a message for each field that is wrong."""
  for name, value in _leaves(fields, ""):
    if isinstance(value, numbers.Real) and math.isnan(value):
      yield f"config.{name} is not a number (nan)"
      continue
    for pattern, allowed in _RANGES.items():
      if re.fullmatch(pattern, name) and value not in allowed:
        yield f"config.{name}={value!r}: expected {allowed}"


def _leaves(
  fields: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any]]:
  """Yields (dotted name, value); of a tuple each element by itself."""
  for key, value in fields.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      elements = value if isinstance(value, (tuple, list)) else (value,)
      for element in elements:
        yield f"{prefix}{key}", element
