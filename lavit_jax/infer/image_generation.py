"""Generates visual tokens after prompts of text and images, with guidance."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lavit_jax.infer import batches, ranges
from lavit_jax.infer.decoding import decode, prompt_rows
from lavit_jax.infer.presets import official, rules
from lavit_jax.infer.prompts import prompts


def write(
  prompter: prompts.Prompter,
  inputs: Sequence[Any],
  negatives: Sequence[Any],
  config: rules.ImageGenerationConfig,
  *,
  form: str,
  seed: int = 0,
  parity: bool = False,
) -> list[np.ndarray]:
  """Generates codes int32[k], k >= 1, for each prompt.

  Args:
    prompter: of the model.
    inputs: prompts, as `Prompter.parse` takes them.
    negatives: a negative prompt for each, or None.
    config: how visual tokens are generated.
    form: how images enter the prompt, "continuous" or "codes".
    seed: the codes of prompt i depend on it and seed + i alone.
    parity: with the quirks of the official code.

  Raises:
    errors.UsageError: the seed is no integer, or out of range.
  """
  seed = ranges.check_seed(seed)
  parsed = [
    (prompter.parse(prompt, parity), n and prompter.parse(n, parity))
    for prompt, n in zip(inputs, negatives, strict=True)
  ]
  codes: list[np.ndarray] = []
  for chunk, count, start in batches.chunks(parsed, prompter.max_batch):
    seeds = np.arange(len(chunk)) + seed + start
    rows, negative_rows = zip(*chunk, strict=True)
    batch = _generate(
      prompter, rows, negative_rows, config, form, seeds, parity
    )
    codes += batch[:count]
  return codes


def _generate(prompter, inputs, negatives, config, form, seeds, parity):
  """Generates the codes of one chunk of parsed prompts."""
  llm, vocab = prompter.language, prompter.language.vocabulary
  mixed = np.array([any(not isinstance(p, str) for p in row) for row in inputs])
  options = {"form": form, "parity": parity, "seeds": seeds if parity else None}
  rows = prompter.rows(inputs, end=[vocab.image_begin], **options)
  fewest, most = _length_limits(prompter, config, parity, rows, mixed)
  suppress = vocab.suppress_for_image()
  if parity:
    suppress = official.suppress_for_image(vocab)
  scales = np.where(mixed, config.mixed_guidance_scale, config.guidance_scale)
  uncond = _unconditional_rows(prompter, negatives, options)
  result = decode.generate(
    llm.model,
    llm.params["llm"],
    prompt=prompter.padded(rows, most),
    uncond=prompter.padded(uncond, most, multiple=1),
    guidance_scale=scales.astype(np.float32),
    rng=jax.vmap(jax.random.key)(seeds) if config.temperature else None,
    temperature=config.temperature,
    top_k=config.top_k,
    top_p=config.top_p,
    min_new_tokens=fewest,
    max_new_tokens=most,
    suppress=suppress,
    eos_id=vocab.image_end,
    pad_id=vocab.eos_id,
    logprobs=False,
  )
  limit = None if parity else prompter.visual.num_patches
  return [vocab.codes_of(row)[:limit] for row in np.asarray(result.tokens)]


def _unconditional_rows(prompter, negatives, options):
  """Returns the rows of negative prompts; without one a row is [IMG] alone."""
  start = prompter.language.vocabulary.image_begin
  rows = [[start]] * len(negatives)
  indices = [i for i, negative in enumerate(negatives) if negative]
  if indices:
    if options["seeds"] is not None:
      options = options | {"seeds": options["seeds"][indices]}
    end = [] if options["parity"] else [start]
    encoded = prompter.rows([negatives[i] for i in indices], end=end, **options)
    for i, row in zip(indices, encoded, strict=True):
      rows[i] = row
  return rows


def _length_limits(prompter, config, parity, rows, mixed):
  """Returns (fewest, most) tokens of an image, [/IMG] included."""
  patches = prompter.visual.num_patches
  most = config.max_new_tokens or patches + 1
  if not parity:
    most = min(most, patches + 1)
    return min(config.min_new_tokens, patches, most), most
  if mixed.any():  # the length of a prompt with images replaces the limit
    most = max(
      prompt_rows.length_of(row) - 1
      for row, has_image in zip(rows, mixed, strict=True)
      if has_image
    )
  return config.min_new_tokens, most
