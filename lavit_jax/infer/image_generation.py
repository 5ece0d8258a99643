"""Visual words written after prompts of text and images, with guidance."""

import jax
import numpy as np

from lavit_jax.infer import batches
from lavit_jax.infer.decoding import decode, prompt_rows
from lavit_jax.infer.presets import official
from lavit_jax.infer.prompts import prompts


def write(
  prompter: prompts.Prompter,
  asked,
  against,
  rule,
  *,
  form: str,
  seed: int = 0,
  parity: bool = False,
) -> list[np.ndarray]:
  """Codes int32[k], k >= 1, for each prompt.

  Args:
    prompter: of the model.
    asked: prompts, as `Prompter.parse` takes them.
    against: for each its negative prompt, or None.
    rule: a `rules.ImageGenerationConfig`.
    form: how images enter, "continuous" or "codes".
    seed: prompt i is a function of itself and seed + i.
    parity: with the quirks of the official code.
  """
  parsed = [prompter.parse(prompt, parity) for prompt in asked]
  negatives = [n and prompter.parse(n, parity) for n in against]
  both = list(zip(parsed, negatives, strict=True))
  codes = []
  for chunk, count, start in batches.chunks(both, prompter.max_batch):
    seeds = np.arange(len(chunk)) + seed + start
    asked, against = zip(*chunk, strict=True)
    drawn = _draw(prompter, asked, against, rule, form, seeds, parity)
    codes += drawn[:count]
  return codes


def _draw(prompter, asked, against, rule, form, seeds, parity):
  """One chunk of parsed prompts."""
  llm, vocab = prompter.language, prompter.language.vocabulary
  mixed = np.array([any(not isinstance(p, str) for p in row) for row in asked])
  how = {"form": form, "parity": parity, "seeds": seeds if parity else None}
  rows = prompter.rows(asked, end=[vocab.image_begin], **how)
  fewest, most = _words_allowed(prompter, rule, parity, rows, mixed)
  suppress = vocab.suppress_for_image()
  if parity:
    suppress = official.suppress_for_image(vocab)
  scales = np.where(mixed, rule.mixed_guidance_scale, rule.guidance_scale)
  uncond = _uncond(prompter, against, how)
  found = decode.generate(
    llm.model,
    llm.params["llm"],
    prompt=prompter.padded(rows, most),
    uncond=prompter.padded(uncond, most, multiple=1),
    guidance_scale=scales.astype(np.float32),
    rng=jax.vmap(jax.random.key)(seeds) if rule.temperature else None,
    temperature=rule.temperature,
    top_k=rule.top_k,
    top_p=rule.top_p,
    min_new_tokens=fewest,
    max_new_tokens=most,
    suppress=suppress,
    eos_id=vocab.image_end,
    pad_id=vocab.eos_id,
    logprobs=False,
  )
  limit = None if parity else prompter.visual.num_patches
  return [vocab.codes_of(row)[:limit] for row in np.asarray(found.tokens)]


def _uncond(prompter, against, how):
  """Rows of the unconditional stream: negative prompts, else [IMG] alone."""
  start = prompter.language.vocabulary.image_begin
  rows = [[start]] * len(against)
  which = [i for i, negative in enumerate(against) if negative]
  if which:
    if how["seeds"] is not None:
      how = how | {"seeds": how["seeds"][which]}
    end = [] if how["parity"] else [start]
    given = prompter.rows([against[i] for i in which], end=end, **how)
    for i, row in zip(which, given, strict=True):
      rows[i] = row
  return rows


def _words_allowed(prompter, rule, parity, rows, mixed):
  """(fewest, most) tokens of an image, [/IMG] counted."""
  patches = prompter.visual.num_patches
  most = rule.max_new_tokens or patches + 1
  if not parity:
    most = min(most, patches + 1)
    return min(rule.min_new_tokens, patches, most), most
  if mixed.any():  # the length of a prompt of tokens replaces the limit
    most = max(
      prompt_rows.length_of(row) - 1
      for row, has_image in zip(rows, mixed, strict=True)
      if has_image
    )
  return rule.min_new_tokens, most
