"""Checks of the arguments of `decode.generate` and `beam.beam_search`."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lavit_jax.core import errors
from lavit_jax.models import llama

Prompt = Mapping[str, Any]  # arrays by name, see `decode.generate`


def check_not_empty(prompt: Prompt, max_new_tokens: int) -> None:
  """Raises UsageError for an empty prompt, or if no token may be generated."""
  length = prompt["tokens"].shape[1]
  if length < 1 or max_new_tokens < 1:
    raise errors.UsageError(
      f"A prompt of {length} tokens and max_new_tokens={max_new_tokens}: both"
      " must be at least 1. Start an empty prompt with [IMG] or a word."
    )


def count_rows(
  prompt: Prompt,
  uncond: Prompt | None,
  guided: bool,
  guidance_scale: jax.typing.ArrayLike,
  max_new_tokens: int,
) -> int:
  """Returns the number of rows; UsageError if the prompts do not match."""
  rows = prompt["tokens"].shape[0]
  check_not_empty(prompt, max_new_tokens)
  if uncond is None and np.any(np.asarray(guidance_scale) != 1):
    raise errors.UsageError(
      f"guidance_scale={guidance_scale} needs a prompt of the unconditional"
      " stream. Give uncond (for images: [IMG] alone), or guidance_scale=1."
    )
  if guided and uncond and uncond["tokens"].shape[0] not in (1, rows):
    raise errors.UsageError(
      f"uncond has {uncond['tokens'].shape[0]} rows, the prompt {rows}: give"
      f" one row for all, or {rows}."
    )
  return rows


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
  """Raises UsageError for parameters of sampling out of range."""
  temperate = 0 <= float(temperature) < float("inf")  # False for NaN
  if not temperate or int(top_k) < 0 or not 0 < float(top_p) <= 1:
    raise errors.UsageError(
      f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected"
      " temperature >= 0 (0 is greedy), top_k >= 0 (0 is all), and top_p in"
      " (0, 1] (1 is all)."
    )


def check_names(others: Mapping[str, Any]) -> None:
  """Raises UsageError if `beam_search` has arguments that it does not take."""
  if others:
    raise errors.UsageError(
      f"beam_search takes no {', '.join(sorted(others))}: it neither samples"
      " nor guides. Leave it out, or sample with decode.generate."
    )


def check_search(
  num_beams: int,
  num_return_sequences: int,
  early_stopping: bool | str,
  offset: int,
) -> None:
  """Raises UsageError for parameters of a beam search out of range."""
  if num_beams < 1 or not 1 <= num_return_sequences <= num_beams:
    raise errors.UsageError(
      f"num_beams={num_beams}, num_return_sequences={num_return_sequences}:"
      " expected at least one beam, and between one sequence and num_beams."
      " Raise num_beams or lower num_return_sequences."
    )
  if early_stopping is not True and early_stopping not in (False, "never"):
    raise errors.UsageError(
      f"early_stopping={early_stopping!r}: expected True, False or 'never'."
    )
  if offset < 0:
    raise errors.UsageError(
      f"length_offset={offset}: expected 0 (only new tokens count), or the"
      " number of other tokens that count, 1 for the official code."
    )


def check_length(
  config: llama.LlamaConfig, prompt: Prompt, max_new_tokens: int
) -> None:
  """Raises UsageError if prompt and new tokens exceed the model's length."""
  check_not_empty(prompt, max_new_tokens)
  longest = int(np.asarray(prompt["mask"]).sum(axis=1).max())
  if longest + max_new_tokens > config.max_len:
    raise errors.UsageError(
      f"A prompt of {longest} tokens and max_new_tokens={max_new_tokens} do"
      f" not fit max_len={config.max_len} of the model. Shorten the prompt, or"
      " lower max_new_tokens."
    )
