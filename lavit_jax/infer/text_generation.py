"""Generates texts after prompts, greedily or by beam search."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lavit_jax.core import errors
from lavit_jax.infer import batches, ranges
from lavit_jax.infer.decoding import beam, decode
from lavit_jax.infer.presets import official, rules
from lavit_jax.infer.prompts import prompts


@dataclasses.dataclass(frozen=True)
class Text:
  """A generated text with its score, by which beams are ranked.

  The score is (sum of the log-probabilities of its tokens) / length **
  length_penalty.
  """

  text: str
  score: float


def write(
  prompter: prompts.Prompter,
  inputs: Sequence[Any],
  config: rules.TextGenerationConfig,
  *,
  seeds: np.ndarray | None = None,
  parity: bool = False,
  count: int = 1,
) -> list[list[Text]]:
  """Generates `count` texts for each prompt, the best first.

  Args:
    prompter: of the model.
    inputs: prompts, as `Prompter.parse` takes them.
    config: how texts are generated.
    seeds: int[n], to sample the patches that are read; None: deterministic.
    parity: with the quirks of the official code.
    count: more than one needs at least as many beams.

  Raises:
    errors.UsageError: there are fewer beams, or no text is asked for.
  """
  ranges.check_integer("count", count, 1)
  if count > config.num_beams:
    raise errors.UsageError(
      f"count={count}: so many texts need at least as many beams, and"
      f" num_beams={config.num_beams}. Raise num_beams, or lower count."
    )
  parsed = [prompter.parse(prompt, parity) for prompt in inputs]
  texts: list[list[Text]] = []
  for chunk, real, start in batches.chunks(parsed, prompter.max_batch):
    chunk_seeds = None
    if seeds is not None:
      chunk_seeds = batches.fill(seeds[start:], len(chunk))
    rows = prompter.rows(
      chunk, form="continuous", seeds=chunk_seeds, parity=parity
    )
    prompt = prompter.padded(rows, config.max_new_tokens)
    tokens, scores = _search(prompter, prompt, config, parity, count)
    for ids, values in zip(tokens[:real], scores[:real], strict=True):
      decoded = [_decode(prompter, row) for row in ids]
      texts.append(list(map(Text, decoded, map(float, values))))
  return texts


def _search(prompter, prompt, config, parity, count):
  """Returns (ids int[B, count, T], scores float[B, count]) after prompts."""
  llm = prompter.language
  shared = {
    "prompt": prompt,
    "suppress": _suppressed(prompter, parity),
    "eos_id": llm.vocabulary.eos_id,
    "pad_id": llm.vocabulary.eos_id,
    "min_new_tokens": config.min_new_tokens,
    "max_new_tokens": config.max_new_tokens,
  }
  if config.num_beams == count == 1:
    result = decode.generate(llm.model, llm.params["llm"], **shared)
    lengths = np.asarray(result.lengths, np.float32)
    if config.length_offset:  # as beams count, see `beam`
      lengths += config.length_offset - np.asarray(result.done)
    scores = np.asarray(result.sum_logprobs) / lengths**config.length_penalty
    return np.asarray(result.tokens)[:, None], scores[:, None]
  beams = beam.beam_search(
    llm.model,
    llm.params["llm"],
    num_beams=config.num_beams,
    length_penalty=config.length_penalty,
    early_stopping=config.early_stopping,
    length_offset=config.length_offset,
    num_return_sequences=count,
    **shared,
  )
  return np.asarray(beams.tokens), np.asarray(beams.scores)


def _suppressed(prompter, parity):
  """Returns bool[V], True at ids that a text may not contain."""
  vocab = prompter.language.vocabulary
  if parity:
    return official.suppress_for_text(vocab)
  suppress = vocab.suppress_for_text()
  suppress[prompter.text.size :] = True  # ids without a piece of text
  return suppress


def _decode(prompter, ids):
  """Returns the text before the eos; ids without a piece are left out."""
  ids = [int(i) for i in ids]
  end = prompter.language.vocabulary.eos_id
  ids = ids[: ids.index(end)] if end in ids else ids
  text = prompter.text
  return text.decode([i for i in ids if i < text.size]).strip()
