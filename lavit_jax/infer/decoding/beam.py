"""Beam search with the rules of Hugging Face's `generate`, under one jit.

A step: log_softmax over the whole vocabulary; the eos is ruled out before
`min_new_tokens`, suppressed ids are ruled out, without normalising again; the
sum of the beam is added; the 2 * num_beams best of all beams are the
*candidates*. A candidate that ends with eos becomes a finished hypothesis if
its rank is below num_beams, else it is dropped; the best num_beams of the other
candidates continue. A prompt keeps its num_beams best hypotheses by the score

  sum of log-probabilities / len ** length_penalty

and is done once num_beams are kept and either `early_stopping` is True, or the
worst of them is at least the bound on future hypotheses,

  sum of the best beam / len ** length_penalty.

Beams still running after `max_new_tokens` are cut, and kept or not by score.

**The length `len`.** transformers has had two rules. `length_offset`, the
number of counted tokens that are not new, chooses one of them; n is the number
of new tokens so far, including the eos:

                                        length_offset=0     length_offset=p > 0
  (a) hypothesis that ended with eos    n                   n - 1 + p
  (b) hypothesis cut at max_new_tokens  n                   n + p
  (c) bound, n after this step          n                   n + p
      the same, "never" and a           max_new_tokens      max_new_tokens + p
      length penalty above 0
      its best beam                     of those that run   of the candidates,
                                        on                  the eos among them
      cut at max_new_tokens are         candidates ranked   all that run on
                                        below num_beams
      after the last step a prompt      no                  yes, and then keeps
      may be found done                                     no cut beam

`length_offset=0` is the default: the rule of the installed transformers (5.x,
`GenerationMixin._beam_search`), in which only new tokens count, for ids and
for embeddings alike. `length_offset=p` is the rule of transformers 4.33
(`BeamSearchScorer`), in which the prompt as `generate` sees it counts and the
eos does not: p is the number of ids of the prompt, padding included, and 1
where it is given as embeddings, for then `generate` puts one bos, which the
model never reads, in their place. The official LaVIT captions and answers by
embeddings with 4.33.2, so `length_offset=1` gives its numbers. With p = 1 the
two rules score (a) alike and differ elsewhere.

The cache has num_beams rows a prompt: the prompt is read once and its rows are
repeated. Where beams change places, only slots that differ are moved.
"""

import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.infer.decoding import checks, decode, scoring
from lavit_jax.models import llama

_FREE = -1e9  # score of an empty beam or hypothesis
_BLOCK = 8  # slots of the cache that are reordered together


class Beams(typing.NamedTuple):
  """The result of `beam_search`: R hypotheses per prompt, the best first.

  With `trace`, the `step_*` arrays are the sorted candidates of each of T
  steps; they are undefined where `step_done`.

  Attributes:
    tokens: int32[B, R, max_new_tokens], the eos included, then padding.
    lengths: int32[B, R], number of generated tokens, the eos included.
    scores: float32[B, R], sum of log-probabilities / len ** length_penalty.
    step_scores: float32[T, B, 2 * num_beams], sums of log-probabilities.
    step_tokens: int32[T, B, 2 * num_beams], their last ids.
    step_beams: int32[T, B, 2 * num_beams], the beam that each continues.
    step_done: bool[T, B], True if the prompt was done before the step.
  """

  tokens: jax.Array
  lengths: jax.Array
  scores: jax.Array
  step_scores: jax.Array | None = None
  step_tokens: jax.Array | None = None
  step_beams: jax.Array | None = None
  step_done: jax.Array | None = None


def beam_search(
  model: llama.Llama,
  params: decode.Params,
  *,
  prompt: decode.Prompt,
  num_beams: int,
  max_new_tokens: int,
  min_new_tokens: int = 0,
  length_penalty: float = 1.0,
  early_stopping: bool | str = False,
  num_return_sequences: int = 1,
  suppress: np.ndarray | None = None,
  eos_id: int,
  pad_id: int = 0,
  length_offset: int = 0,
  trace: bool = False,
  **others: Any,
) -> Beams:
  """Finds the most probable continuations of each prompt, ended or cut.

  There is one compilation for each padded prompt shape, num_beams,
  max_new_tokens, num_return_sequences and trace; the rest may change freely.

  Args:
    model: hashable, static under jit.
    params: its parameters (what `init` returns under "params", unboxed).
    prompt: dict of tokens int[B, L], mask bool[B, L] (padding on the left)
      and, for continuous inputs, embeds float[B, L, D] and use_embeds
      bool[B, L].
    num_beams: static.
    max_new_tokens: static.
    min_new_tokens: the eos is not among the first so many tokens.
    length_penalty: above 0 prefers long hypotheses, below 0 short ones.
    early_stopping: True ends a prompt at num_beams hypotheses; False if by its
      current length none looks better; "never" if none can become better.
    num_return_sequences: R, static, at most num_beams.
    suppress: bool[V], ids that are never generated; V is at most the padded
      vocabulary.
    eos_id: ends a hypothesis.
    pad_id: fills a row after its end.
    length_offset: how lengths count, see the head of this module.
    trace: static; return the candidates of every step as well.
    **others: none is allowed; arguments of sampling are refused by name.

  Raises:
    errors.UsageError: arguments that do not go together.
  """
  checks.check_names(others)
  checks.check_search(
    num_beams, num_return_sequences, early_stopping, length_offset
  )
  prompt = decode.arrays_of(prompt)
  checks.check_length(model.config, prompt, max_new_tokens)
  scalars = {
    "min_new_tokens": np.int32(min_new_tokens),
    "length_penalty": np.float32(length_penalty),
    "length_offset": np.int32(length_offset),
    # One beam is greedy decoding in transformers, whatever `early_stopping`.
    "stop_when_full": np.bool_(early_stopping is True or num_beams == 1),
    "never": np.bool_(early_stopping == "never"),
    "eos_id": np.int32(eos_id),
    "pad_id": np.int32(pad_id),
  }
  return _search(
    model,
    _Sizes(int(num_beams), int(max_new_tokens), int(num_return_sequences)),
    bool(trace),
    params,
    prompt,
    scalars,
    scoring.suppressed_ids(model.config, suppress),
  )


class _Sizes(typing.NamedTuple):
  """Static sizes of the search, beside those of the prompt."""

  num_beams: int  # K
  max_new_tokens: int  # T
  num_return_sequences: int  # R


class _Running(typing.NamedTuple):
  """Beams that continue, the best first."""

  scores: jax.Array  # float32[B, K], sums of log-probabilities
  tokens: jax.Array  # int32[B, K, T]
  parents: jax.Array  # int32[B, K], the beam each continues
  ranks: jax.Array  # int32[B, K], its rank among the candidates
  moved: jax.Array  # int32[], the first new token that changes its beam


class _Kept(typing.NamedTuple):
  """Finished hypotheses, the best first; empty entries come last."""

  scores: jax.Array  # float32[B, K], with the length penalty
  tokens: jax.Array  # int32[B, K, T]
  lengths: jax.Array  # int32[B, K], 0 at an empty entry


class _Candidates(typing.NamedTuple):
  """The best continuations of a step, sorted: [B, 2 * K] each."""

  scores: jax.Array  # float32
  tokens: jax.Array  # int32
  beams: jax.Array  # int32


class _State(typing.NamedTuple):
  """The carry of the loop, without the cache."""

  step: jax.Array  # int32[], new tokens so far
  running: _Running
  kept: _Kept
  done: jax.Array  # bool[B]
  trace: tuple  # (scores, tokens, beams, done) of all steps, or ()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(model, sizes, trace, params, prompt, scalars, ruled_out):
  num_beams, max_new_tokens, num_return_sequences = sizes
  rows, length = prompt["tokens"].shape
  room = -(-max_new_tokens // _BLOCK) * _BLOCK  # whole blocks, see _reorder
  logits, cache = decode.prefill(model, params, prompt, room)
  for name, axis in (("k", 1), ("v", 1), ("valid", 0)):
    cache[name] = jnp.repeat(cache[name], num_beams, axis)
  logits = jnp.repeat(logits, num_beams, axis=0)  # [B * K, V]

  def step(state, logits):
    logprobs = jax.nn.log_softmax(logits)
    logprobs = scoring.process(logprobs, state.step, scalars, ruled_out)
    logprobs = logprobs.reshape(rows, num_beams, -1)  # [B, K, V]
    best = _candidates(logprobs + state.running.scores[..., None])
    return _next(state, best, scalars)

  def body(carry):
    state, cache = carry
    cache = _reorder(cache, state, length)
    ids = state.running.tokens[..., state.step - 1].reshape(-1)
    logits, cache = decode.advance(model, params, ids, cache)
    return step(state, logits), cache

  def going(carry):
    state, _ = carry
    return (state.step < max_new_tokens) & ~state.done.all()

  start = _start(rows, num_beams, max_new_tokens, scalars["pad_id"], trace)
  carry = (step(start, logits), cache)
  state, _ = jax.lax.while_loop(going, body, carry)
  kept = _cut(state, scalars)
  scores, tokens, lengths = (x[:, :num_return_sequences] for x in kept)
  return Beams(tokens, lengths, scores, *state.trace)


def _start(rows, num_beams, max_new_tokens, pad_id, trace):
  """Returns the state before the first step; one beam per prompt is used."""
  index = jnp.broadcast_to(jnp.arange(num_beams), (rows, num_beams))
  tokens = jnp.full((rows, num_beams, max_new_tokens), pad_id, jnp.int32)
  running = _Running(
    jnp.where(index == 0, 0.0, _FREE), tokens, index, index, jnp.int32(0)
  )
  kept = _Kept(
    jnp.full(index.shape, _FREE), tokens, jnp.zeros(index.shape, jnp.int32)
  )
  arrays = ()
  if trace:
    shape = (max_new_tokens, rows, 2 * num_beams)
    arrays = (
      jnp.zeros(shape),
      jnp.zeros(shape, jnp.int32),
      jnp.zeros(shape, jnp.int32),
      jnp.ones(shape[:2], bool),
    )
  done = jnp.zeros(rows, bool)
  return _State(jnp.int32(0), running, kept, done, arrays)


def _candidates(scores) -> _Candidates:
  """Returns the 2 * K best of float32[B, K, V], by beam, then of all."""
  rows, num_beams, vocab = scores.shape
  each = min(2 * num_beams, vocab)
  scores, tokens = jax.lax.top_k(scores, each)  # [B, K, each]
  scores, index = jax.lax.top_k(scores.reshape(rows, -1), 2 * num_beams)
  tokens = jnp.take_along_axis(tokens.reshape(rows, -1), index, axis=1)
  return _Candidates(scores, tokens, index // each)


def _next(state, found, scalars):
  """Returns the state after a step with the candidates `found`."""
  step, offset = state.step, scalars["length_offset"]
  num_beams = state.running.scores.shape[1]
  tokens = _take(state.running.tokens, found.beams)  # [B, 2 * K, T]
  column = jnp.arange(tokens.shape[2])
  tokens = jnp.where(column == step, found.tokens[..., None], tokens)
  ended = found.tokens == scalars["eos_id"]
  finished = ended & (jnp.arange(2 * num_beams) < num_beams)
  finished &= ~state.done[:, None]
  length = step + 1 + jnp.maximum(offset - 1, 0)
  kept = _keep(
    state.kept, finished, found.scores, tokens, step + 1, length, scalars
  )
  # At least K of the 2 * K do not end: one eos a beam.
  _, ranks = jax.lax.top_k(found.scores + jnp.where(ended, _FREE, 0), num_beams)
  tokens = _take(tokens, ranks)
  changed = (tokens != state.running.tokens) & ~state.done[:, None, None]
  running = _Running(
    _take(found.scores, ranks),
    tokens,
    _take(found.beams, ranks),
    ranks,
    jnp.where(changed.any((0, 1)), column, step).min(),
  )
  best = jnp.where(offset > 0, found.scores[:, 0], running.scores[:, 0])
  done = state.done | _is_done(kept, best, step + 1, scalars)
  last = step + 1 == column.size
  done = jnp.where(last & (offset == 0), state.done, done)
  trace = tuple(
    array.at[step].set(new)
    for array, new in zip(state.trace, (*found, state.done), strict=False)
  )
  return _State(step + 1, running, kept, done, trace)


def _keep(kept, finished, sums, tokens, written, length, scalars):
  """Returns the K best of the kept and the new hypotheses.

  Args:
    kept: hypotheses so far.
    finished: bool[B, n], which of the new sequences are hypotheses.
    sums: float32[B, n], sums of log-probabilities.
    tokens: int32[B, n, T].
    written: int, number of new tokens.
    length: the same as the score counts it.
    scalars: with length_penalty.
  """
  scores = sums / _penalty(length, scalars)
  new = _Kept(
    jnp.where(finished, scores, -jnp.inf),
    tokens,
    jnp.full(finished.shape, written),
  )
  both = [jnp.concatenate(x, axis=1) for x in zip(kept, new, strict=True)]
  _, best = jax.lax.top_k(both[0], kept.scores.shape[1])
  return _Kept(*(_take(x, best) for x in both))


def _is_done(kept, best, written, scalars):
  """Returns bool[B]: K hypotheses are kept, and no beam can do better."""
  penalty = scalars["length_penalty"]
  limit = kept.tokens.shape[2]
  furthest = jnp.where(scalars["never"] & (penalty > 0), limit, written)
  furthest += scalars["length_offset"]
  bound = best / _penalty(furthest, scalars)
  full = (kept.lengths > 0).all(axis=1)
  no_better = kept.scores.min(axis=1) >= bound
  return full & (scalars["stop_when_full"] | no_better)


def _cut(state, scalars):
  """Cuts the running beams of prompts that are not done, and keeps the best."""
  running, step, offset = state.running, state.step, scalars["length_offset"]
  finished = (offset > 0) | (running.ranks < running.ranks.shape[1])
  finished &= ~state.done[:, None]
  new = (finished, running.scores, running.tokens, step, step + offset)
  return _keep(state.kept, *new, scalars)


def _penalty(length, scalars):
  return length.astype(jnp.float32) ** scalars["length_penalty"]


def _take(x, index):
  """Returns [B, k, ...], the entries `index` int[B, k] of [B, n, ...]."""
  return jax.vmap(lambda row, i: row[i])(x, index)


def _reorder(cache, state, length):
  """Copies to each beam the slots of its parent that differ from its own.

  The slots of the prompt (`length`) are the same, and so are those before the
  first new token that differs (`moved`): in practice all but the last few. The
  rest is copied block by block, in place.
  """
  parents = state.running.parents
  split = (cache["k"].shape[0], *parents.shape)
  take = jax.vmap(lambda row, i: row[:, i], in_axes=(1, 0), out_axes=1)

  def block(i, x):
    at = length + i * _BLOCK
    old = jax.lax.dynamic_slice_in_dim(x, at, _BLOCK, axis=3)
    new = take(old.reshape(*split, *old.shape[2:]), parents)
    new = new.reshape(old.shape)
    return jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=3)

  first = state.running.moved // _BLOCK
  last = -(-(state.step - 1) // _BLOCK)  # the newest token has no slot yet
  k, v = jax.lax.fori_loop(
    first,
    last,
    lambda i, both: tuple(block(i, x) for x in both),
    (cache["k"], cache["v"]),
  )
  return cache | {"k": k, "v": v}
