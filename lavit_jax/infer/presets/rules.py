"""Presets: how a model generates unless a call says otherwise.

There are two: `OURS` for models trained here, and `OFFICIAL`, the defaults of
the official release (LaVIT's understanding and generation classes), for
imported ones. `rules_of` says which one a model has. The presets do not contain
the quirks of the official code, which `parity=True` of class LaVIT adds
(`official.py` lists them).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

from lavit_jax.core import errors
from lavit_jax.infer import ranges
from lavit_jax.infer.presets import official

_Config = TypeVar("_Config")

# A step looks through beams x vocabulary; a cache for each beam is held.
MOST_BEAMS = 1024
_LEAST_TEMPERATURE = 1e-6  # logits divided by less overflow


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextGenerationConfig:
  """How a text is generated; the fields are those of `beam.beam_search`.

  Attributes:
    num_beams: 1 is greedy decoding.
    min_new_tokens: fewest tokens before the end of the text.
    max_new_tokens: the text is cut after so many.
    length_penalty: of beams; above 0 prefers long texts.
    early_stopping: of beams: True, False or "never".
    length_offset: how beams count their length (head of `beam.py`): 1 as the
      official code, 0 as transformers 5.
  """

  num_beams: int = 1
  min_new_tokens: int = 0
  max_new_tokens: int = 64
  length_penalty: float = 1.0
  early_stopping: bool | str = False
  length_offset: int = 0

  def __post_init__(self):
    integer = functools.partial(ranges.replace, self, ranges.check_integer)
    integer("num_beams", 1, MOST_BEAMS)
    integer("min_new_tokens", 0)
    integer("max_new_tokens", 1)
    integer("length_offset", 0)
    ranges.replace(self, ranges.check_number, "length_penalty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageGenerationConfig:
  """How visual tokens are generated.

  Attributes:
    guidance_scale: of the LLM, for prompts of text alone; 1 is off.
    mixed_guidance_scale: the same for prompts with an image.
    temperature: 0 is greedy.
    top_k: sample from the k most probable tokens, 0: from all.
    top_p: sample from the most probable tokens that together have this
      probability, 1: from all.
    min_new_tokens: fewest tokens; never more than one per patch.
    max_new_tokens: most tokens, [/IMG] included; None: one per patch.
  """

  guidance_scale: float = 1.0
  mixed_guidance_scale: float = 1.0
  temperature: float = 1.0
  top_k: int = 50
  top_p: float = 1.0
  min_new_tokens: int = 1
  max_new_tokens: int | None = None

  def __post_init__(self):
    number = functools.partial(ranges.replace, self, ranges.check_number)
    integer = functools.partial(ranges.replace, self, ranges.check_integer)
    number("guidance_scale")
    number("mixed_guidance_scale")
    number("temperature", 0)
    number("top_p", 0)
    integer("top_k", 0)
    integer("min_new_tokens", 0)
    if self.max_new_tokens is not None:
      integer("max_new_tokens", 1)
    if 0 < self.temperature < _LEAST_TEMPERATURE:
      raise errors.UsageError(
        f"temperature={self.temperature}: expected 0 (greedy), or at least"
        f" {_LEAST_TEMPERATURE}."
      )
    if not 0 < self.top_p <= 1:
      raise errors.UsageError(
        f"top_p={self.top_p}: expected a probability above 0, at most 1 (all)."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationPreset:
  """Defaults that differ between models trained here and official ones.

  Attributes:
    caption: see `TextGenerationConfig`.
    answer: see `TextGenerationConfig`.
    draw: see `ImageGenerationConfig`.
    short: cut captions to a sentence and answers to their first words.
    picture_prompts: how an image in a prompt enters the LLM when an image is
      generated: "continuous", as the paper trains it and as images are read
      in all other tasks, or "codes", as in the official generation class.
  """

  caption: TextGenerationConfig
  answer: TextGenerationConfig
  draw: ImageGenerationConfig
  short: bool
  picture_prompts: str


# Guidance 2 and temperature 0.5: with `tiny` better than the official 3 and 1.
OURS = GenerationPreset(
  caption=TextGenerationConfig(),
  answer=TextGenerationConfig(max_new_tokens=12),
  draw=ImageGenerationConfig(
    guidance_scale=2.0, mixed_guidance_scale=2.0, temperature=0.5, top_k=50
  ),
  short=False,
  picture_prompts="continuous",
)
OFFICIAL = GenerationPreset(
  caption=TextGenerationConfig(**official.CAPTION),
  answer=TextGenerationConfig(**official.ANSWER),
  draw=ImageGenerationConfig(
    guidance_scale=official.GUIDANCE_TEXT,
    mixed_guidance_scale=official.GUIDANCE_MULTIMODAL,
    **official.DRAW,
  ),
  short=True,
  picture_prompts="codes",
)
BY_NAME = {"ours": OURS, "official": OFFICIAL}


def rules_of(meta: Mapping[str, Any]) -> GenerationPreset:
  """Returns the preset of a model by the metadata of its part `llm`."""
  imported = meta.get("port", {}).get("source") == "lavit"
  return OFFICIAL if imported else OURS


def changed(config: _Config, options: Mapping[str, Any]) -> _Config:
  """Returns a config with those options of a call that are not None.

  Args:
    config: a dataclass.
    options: values of its fields.

  Raises:
    errors.UsageError: an option is not a field of the config or out of range,
      or min_new_tokens is more than max_new_tokens. A fewest number that only
      the config has gives way to a smaller max_new_tokens of the call.
  """
  fields = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]  # a dataclass
  if unknown := sorted(set(options) - set(fields)):
    raise errors.UsageError(
      f"Unknown option {', '.join(unknown)}: expected one of"
      f" {', '.join(fields)}."
    )
  values = {name: v for name, v in options.items() if v is not None}
  result = dataclasses.replace(config, **values)  # type: ignore[type-var]  # likewise
  fewest = values.get("min_new_tokens")
  most = getattr(result, "max_new_tokens", None)
  if fewest is not None and most is not None and fewest > most:
    raise errors.UsageError(
      f"min_new_tokens={fewest} is more than max_new_tokens={most}. Lower the"
      " first, or raise the second."
    )
  return result
