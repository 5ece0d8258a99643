"""Which images and texts of a source are used: the filters of a config.

  filters = dict(
    min_side=200,            # pixels of the shorter side of an image
    max_aspect=3.0,          # longer side over the shorter one
    min_chars=5, max_chars=500,
    script="latin",          # of most letters of a text
    pattern=r"\\w+ \\w+",      # a regular expression that a text holds
    without=r"(?i)lorem|https?://",
    fields={"similarity": (0.28, None)},  # of a sample's json: least, most
  )

Filters of texts are those of captions and of plain texts; dialogues, edits and
documents are chosen by their images alone.
"""

import dataclasses
import functools
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from lavit_jax.core import errors

# Beginnings of the names that Unicode has for the letters of a script.
_SCRIPTS = {
  "latin": ("LATIN",),
  "greek": ("GREEK",),
  "cyrillic": ("CYRILLIC",),
  "arabic": ("ARABIC",),
  "hebrew": ("HEBREW",),
  "devanagari": ("DEVANAGARI",),
  "bengali": ("BENGALI",),
  "tamil": ("TAMIL",),
  "thai": ("THAI",),
  "hangul": ("HANGUL",),
  "chinese": ("CJK",),
  "japanese": ("CJK", "HIRAGANA", "KATAKANA"),
}
_MOST = 0.5  # share of the letters that are of the script


@dataclasses.dataclass(frozen=True)
class Filters:
  """What is kept of a source; a filter of 0 or "" keeps all.

  Attributes:
    min_side: pixels of the shorter side of an image, at least.
    max_aspect: longer side over the shorter one, at most.
    min_chars: characters of a text, at least.
    max_chars: characters of a text, at most.
    script: of most letters of a text, one of those above.
    pattern: regular expression that is found in a text.
    without: regular expression that is not.
    fields: (least, most) of numbers in a sample's json; None is no limit. A
      sample without the number is left out.
  """

  min_side: int = 0
  max_aspect: float = 0.0
  min_chars: int = 0
  max_chars: int = 0
  script: str = ""
  pattern: str = ""
  without: str = ""
  fields: Mapping[str, tuple[float | None, float | None]] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self):
    for name in ("script", "pattern", "without"):
      if not isinstance(getattr(self, name), str):
        raise errors.ConfigError(
          f"filters.{name}={getattr(self, name)!r}: expected a text."
        )
    if self.script and self.script not in _SCRIPTS:
      raise errors.ConfigError(
        f"filters.script={self.script!r}: expected one of {sorted(_SCRIPTS)}."
      )
    for name in ("pattern", "without"):
      try:
        re.compile(getattr(self, name))
      except (re.error, RecursionError, OverflowError) as error:
        raise errors.ConfigError(
          f"filters.{name}={getattr(self, name)!r} is no regular expression"
          f" ({error})."
        ) from error
    for name in ("min_side", "max_aspect", "min_chars", "max_chars"):
      value = getattr(self, name)
      if not _is_number(value) or not 0 <= value < math.inf:
        raise errors.ConfigError(
          f"filters.{name}={value!r}: expected a number, 0 or more."
        )
    if 0 < self.max_aspect < 1:
      raise errors.ConfigError(
        f"filters.max_aspect={self.max_aspect}: expected 1 or more, the longer"
        " side over the shorter one; or 0 for any."
      )
    if 0 < self.max_chars < self.min_chars:
      raise errors.ConfigError(
        f"filters.min_chars={self.min_chars} is more than"
        f" max_chars={self.max_chars}: no text has both."
      )
    for name, limits in self.fields.items():
      if not _are_limits(limits):
        raise errors.ConfigError(
          f"filters.fields.{name}={limits!r}: expected (least, most), numbers"
          " or None, the smaller one first."
        )

  @classmethod
  def of(cls, config: Mapping[str, Any] | None) -> "Filters":
    """Returns the filters of a config.

    Raises:
      errors.ConfigError: a filter is unknown, or cannot be.
    """
    config = {} if config is None else config
    if not hasattr(config, "items"):
      raise errors.ConfigError(
        f"filters={config!r}: expected filters by name, such as min_side=200."
      )
    given = {str(name): value for name, value in config.items()}
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(given) - known):
      raise errors.ConfigError(
        f"filters has {unknown}, which are no filters. There are"
        f" {sorted(known)}."
      )
    if "fields" in given:
      if not hasattr(given["fields"], "items"):
        raise errors.ConfigError(
          f"filters.fields={given['fields']!r}: expected limits by name, such"
          ' as {"similarity": (0.28, None)}.'
        )
      fields = {str(name): x for name, x in given["fields"].items()}
      given["fields"] = {
        name: tuple(limits) if isinstance(limits, list) else limits
        for name, limits in sorted(fields.items())
      }
    return cls(**given)

  @property
  def of_sizes(self) -> bool:
    """Whether sizes of images matter."""
    return bool(self.min_side or self.max_aspect)

  @property
  def of_texts(self) -> bool:
    """Whether texts matter."""
    return bool(
      self.min_chars
      or self.max_chars
      or self.script
      or self.pattern
      or self.without
    )

  @property
  def keep_all(self) -> bool:
    """Whether there is none."""
    return not (self.of_sizes or self.of_texts or self.fields)

  def keeps_size(self, height: int, width: int) -> bool:
    """Whether an image of this size is kept."""
    shorter, longer = sorted((height, width))
    return shorter >= max(self.min_side, 1) and (
      not self.max_aspect or longer <= self.max_aspect * shorter
    )

  def keeps_text(self, text: str) -> bool:
    """Whether a text is kept."""
    if len(text) < self.min_chars or 0 < self.max_chars < len(text):
      return False
    if self.script and not _is_of(text, _SCRIPTS[self.script]):
      return False
    if self.pattern and not re.search(self.pattern, text):
      return False
    return not (self.without and re.search(self.without, text))

  def keeps_fields(self, found: Mapping[str, Any]) -> bool:
    """Whether a sample with these fields of its json is kept."""
    for name, (least, most) in self.fields.items():
      value = found.get(name)
      if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
      # A NaN is within no limits.
      if least is not None and not value >= least:
        return False
      if most is not None and not value <= most:
        return False
    return True


def _are_limits(limits):
  """Whether they are a pair of numbers or None."""
  if not isinstance(limits, tuple) or len(limits) != 2:
    return False
  numbers = [x for x in limits if x is not None]
  return all(map(_is_number, numbers)) and numbers == sorted(numbers)


def _is_number(value):
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return number and not math.isnan(value)


def _is_of(text, names):
  """Whether most letters of a text are of a script; false without letters."""
  letters = [_name(c) for c in text if c.isalpha()]
  return sum(name.startswith(names) for name in letters) > _MOST * len(letters)


@functools.lru_cache(maxsize=1 << 16)
def _name(character):
  return unicodedata.name(character, "")
