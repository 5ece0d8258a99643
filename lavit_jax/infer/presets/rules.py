"""How a model writes and draws, unless a call says otherwise.

Two sets: `OURS`, for models trained here, and `OFFICIAL`, the defaults of the
official release (LaVIT's understanding and generation classes), for imported
ones. A model directory tells which it wants (`rules_of`). The quirks of the
official code are not in here: `parity=True` of class LaVIT adds them
(`official.py` lists them).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from lavit_jax.core import errors
from lavit_jax.infer.presets import official

_Rule = TypeVar("_Rule")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextGenerationConfig:
  """How a text is written; the fields are those of `beam.beam_search`.

  Attributes:
    num_beams: 1 is greedy decoding.
    min_new_tokens: the text does not end before.
    max_new_tokens: it is cut there.
    length_penalty: of beams; above 0 prefers long texts.
    early_stopping: of beams: True, False or "never".
    length_offset: how beams count their length (head of `beam.py`): 1 as the
      official code does, 0 as today's transformers does.
  """

  num_beams: int = 1
  min_new_tokens: int = 0
  max_new_tokens: int = 64
  length_penalty: float = 1.0
  early_stopping: bool | str = False
  length_offset: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageGenerationConfig:
  """How visual words are drawn.

  Attributes:
    guidance_scale: of the LLM, for prompts of text alone; 1 is off.
    mixed_guidance_scale: for prompts with an image.
    temperature: 0 is greedy.
    top_k: keep the likeliest k words, 0 all.
    top_p: keep the likeliest words that hold this probability, 1 all.
    min_new_tokens: words at least; at most one a patch in any case.
    max_new_tokens: words at most, [/IMG] counted; None: one a patch.
  """

  guidance_scale: float = 1.0
  mixed_guidance_scale: float = 1.0
  temperature: float = 1.0
  top_k: int = 50
  top_p: float = 1.0
  min_new_tokens: int = 1
  max_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationPreset:
  """Everything that differs between models trained here and official ones.

  Attributes:
    caption: see `TextGenerationConfig`.
    answer: see `TextGenerationConfig`.
    draw: see `ImageGenerationConfig`.
    short: cut captions to a sentence and answers to their first words.
    picture_prompts: how an image in a prompt to draw from enters the LLM:
      "continuous", as the paper trains it and as images are read
      everywhere else, or "codes", as the official generation class does.
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
  """The rules for an `llm` part, by its description."""
  imported = meta.get("port", {}).get("source") == "lavit"
  return OFFICIAL if imported else OURS


def changed(rule: _Rule, options: Mapping[str, Any]) -> _Rule:
  """`rule` with the options of a call, those that are not None.

  Raises:
    errors.UsageError: an option that the rule does not have.
  """
  (options,) = split(options, type(rule))
  given = {name: v for name, v in options.items() if v is not None}
  return dataclasses.replace(rule, **given)


def split(options: Mapping[str, Any], *kinds: type) -> list[dict[str, Any]]:
  """Options for each of several dataclasses, by the names of their fields.

  Raises:
    errors.UsageError: an option that none of them has.
  """
  names = [[f.name for f in dataclasses.fields(kind)] for kind in kinds]
  known = [name for listed in names for name in listed]
  if unknown := sorted(set(options) - set(known)):
    raise errors.UsageError(
      f"Unknown option {', '.join(unknown)}: expected one of"
      f" {', '.join(known)}."
    )
  return [{n: v for n, v in options.items() if n in some} for some in names]
