"""Texts written after prompts: greedily or by beam search."""

import dataclasses

import numpy as np

from lavit_jax.infer import batches
from lavit_jax.infer.decoding import beam, decode
from lavit_jax.infer.presets import official
from lavit_jax.infer.prompts import prompts


@dataclasses.dataclass(frozen=True)
class Text:
  """A text that was written, with its score.

  The score is the sum of the log-probabilities of its tokens over length **
  length_penalty: what beams are ranked by.
  """

  text: str
  score: float


def write(
  prompter: prompts.Prompter, asked, rule, *, seeds=None, parity=False, count=1
) -> list[list[Text]]:
  """`count` texts for each prompt, the best first.

  Args:
    prompter: of the model.
    asked: prompts, as `Prompter.parse` takes them.
    rule: a `rules.TextGenerationConfig`.
    seeds: int[n], to sample which patches are read; None: deterministic.
    parity: with the quirks of the official code.
    count: more than one needs `rule.num_beams` of at least as many.
  """
  parsed = [prompter.parse(prompt, parity) for prompt in asked]
  out = []
  for chunk, real, start in batches.chunks(parsed, prompter.max_batch):
    chosen = None
    if seeds is not None:
      chosen = batches.fill(seeds[start:], len(chunk))
    rows = prompter.rows(chunk, form="continuous", seeds=chosen, parity=parity)
    prompt = prompter.padded(rows, rule.max_new_tokens)
    tokens, scores = _search(prompter, prompt, rule, parity, count)
    for ids, values in zip(tokens[:real], scores[:real], strict=True):
      words = [_decoded(prompter, row) for row in ids]
      out.append(list(map(Text, words, map(float, values))))
  return out


def _search(prompter, prompt, rule, parity, count):
  """(ids int[B, count, T], scores float[B, count]) that continue prompts."""
  llm = prompter.language
  shared = {
    "prompt": prompt,
    "suppress": _not_text(prompter, parity),
    "eos_id": llm.vocabulary.eos_id,
    "pad_id": llm.vocabulary.eos_id,
    "min_new_tokens": rule.min_new_tokens,
    "max_new_tokens": rule.max_new_tokens,
  }
  if rule.num_beams == count == 1:
    found = decode.generate(llm.model, llm.params["llm"], **shared)
    lengths = np.asarray(found.lengths, np.float32)
    if rule.length_offset:  # as beams count, see `beam`
      lengths += rule.length_offset - np.asarray(found.done)
    scores = np.asarray(found.sum_logprobs) / lengths**rule.length_penalty
    return np.asarray(found.tokens)[:, None], scores[:, None]
  found = beam.beam_search(
    llm.model,
    llm.params["llm"],
    num_beams=rule.num_beams,
    length_penalty=rule.length_penalty,
    early_stopping=rule.early_stopping,
    length_offset=rule.length_offset,
    num_return_sequences=count,
    **shared,
  )
  return np.asarray(found.tokens), np.asarray(found.scores)


def _not_text(prompter, parity):
  """bool[V]: ids that a text may not contain."""
  vocab = prompter.language.vocabulary
  if parity:
    return official.suppress_for_text(vocab)
  suppress = vocab.suppress_for_text()
  suppress[prompter.text.size :] = True  # ids that stand for no piece
  return suppress


def _decoded(prompter, ids):
  """The text before the end; what is no piece is left out."""
  ids = [int(i) for i in ids]
  end = prompter.language.vocabulary.eos_id
  ids = ids[: ids.index(end)] if end in ids else ids
  text = prompter.text
  return text.decode([i for i in ids if i < text.size]).strip()
