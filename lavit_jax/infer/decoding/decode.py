"""The one decode engine, for text and for visual tokens.

Prefill, then a `lax.while_loop` over a static key-value cache. Guidance runs
the conditional and the unconditional stream as one batch of twice the rows.
Shapes are static: one compile a padded prompt shape and `max_new_tokens`.
The parts (`prefill`, `advance`, `process`) are open to other searches: a beam
reorders the rows of the cache between two calls of `advance`.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors
from lavit_jax.models import llama

_NEVER = -jnp.inf


class Generation(typing.NamedTuple):
  """What `generate` returns, a row for each prompt.

  Attributes:
    tokens: int32[B, max_new_tokens], the eos included, then padding.
    lengths: int32[B], tokens written, the eos included.
    done: bool[B], True where the eos came.
    sum_logprobs: float32[B], log-probability of the tokens written, under
      the plain conditional model (no guidance, no temperature); NaN where
      it was not asked for.
  """

  tokens: jax.Array
  lengths: jax.Array
  done: jax.Array
  sum_logprobs: jax.Array


def left_pad(rows, length: int | None = None, multiple: int = 1, pad_id=0):
  """Prompts of different length as one batch, padding on the left.

  left_pad([[5, 6, 7], [8]]) gives tokens [[5, 6, 7], [0, 0, 8]] and mask
  [[1, 1, 1], [0, 0, 1]].

  Args:
    rows: lists of ids, none empty.
    length: of the result; by default the longest row.
    multiple: the length is rounded up to it (fewer shapes to compile).
    pad_id: the id at padding.

  Returns:
    dict(tokens int32[B, L], mask bool[B, L]), numpy.
  """
  longest = max(len(row) for row in rows)
  length = -(-(length or longest) // multiple) * multiple
  if longest > length or not all(len(row) for row in rows):
    raise errors.UsageError(
      f"Prompts of {min(map(len, rows))} to {longest} tokens do not fit"
      f" length={length}: each needs 1 to {length}. Raise length, or shorten"
      " the prompt."
    )
  tokens = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    tokens[i, length - len(row) :] = row
    mask[i, length - len(row) :] = True
  return {"tokens": tokens, "mask": mask}


def generate(
  model: llama.Llama,
  params,
  *,
  prompt,
  rng=None,
  max_new_tokens: int,
  min_new_tokens=0,
  temperature=1.0,
  top_k: int = 0,
  top_p=1.0,
  suppress=None,
  eos_id,
  pad_id=0,
  guidance_scale=1.0,
  uncond=None,
  logprobs: bool = True,
) -> Generation:
  """Writes up to `max_new_tokens` after each prompt.

  The order of things is the official one: s = log_softmax(conditional), u =
  log_softmax(unconditional), s = g * (s - u) + u; the eos is ruled out before
  `min_new_tokens`; suppressed ids are ruled out; temperature; top-k; top-p.

  Args:
    model: hashable, static under jit.
    params: its parameters (what `init` returns under "params", unboxed).
    prompt: dict of tokens int[B, L], mask bool[B, L] (padding on the left)
      and, for continuous inputs, embeds float[B, L, D] and use_embeds
      bool[B, L].
    rng: a key, or B keys, one a row: a row's draw then does not depend on
      its batch. None means greedy.
    max_new_tokens: static.
    min_new_tokens: the eos is not written among the first so many.
    temperature: 0 means greedy.
    top_k: static; keep the k likeliest ids, 0 all.
    top_p: keep the likeliest ids that hold this probability, 1 all.
    suppress: bool[V] of ids never written, V at most the padded vocabulary.
    eos_id: ends a row.
    pad_id: fills a row after its end.
    guidance_scale: g, a scalar or float[B]; 1 is off.
    uncond: the prompt dict of the unconditional stream, B rows or one.
    logprobs: static; False leaves `sum_logprobs` out. The head is then only
      multiplied between the first and the last id that may be written, a
      third of it for images, at the same ids (the sum over the rest of the
      vocabulary shifts all scores of a row alike).

  Raises:
    errors.UsageError: arguments that do not go together.
  """
  guided = uncond is not None and bool(np.any(np.asarray(guidance_scale) != 1))
  sampled = rng is not None and float(temperature) > 0
  rows = _check(prompt, uncond, guided, guidance_scale, max_new_tokens)
  _check_sampling(temperature, top_k, top_p)
  ruled_out = never_written(model.config, suppress)
  scalars = {
    "min_new_tokens": jnp.int32(min_new_tokens),
    "temperature": jnp.float32(temperature if sampled else 1.0),
    "top_p": jnp.float32(top_p),
    "eos_id": jnp.int32(eos_id),
    "pad_id": jnp.int32(pad_id),
    "guidance": jnp.broadcast_to(jnp.float32(guidance_scale), (rows,)),
  }
  window = None if logprobs else _window(ruled_out)
  first, last = window or (0, model.config.padded_vocab)
  return _generate(
    model,
    params,
    arrays_of(prompt),
    arrays_of(uncond) if guided else None,
    _row_keys(rng, rows) if sampled else None,
    scalars,
    ruled_out[first:last],
    max_new_tokens=int(max_new_tokens),
    top_k=min(int(top_k), last - first) if sampled else 0,
    nucleus=sampled and float(top_p) < 1,
    window=window,
  )


def _window(ruled_out) -> tuple[int, int]:
  """(first, last + 1) of the ids that may be written."""
  allowed = np.flatnonzero(~ruled_out)
  return (int(allowed[0]), int(allowed[-1]) + 1) if len(allowed) else (0, 1)


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=("max_new_tokens", "top_k", "nucleus", "window"),
)
def _generate(
  model,
  params,
  prompt,
  uncond,
  keys,
  scalars,
  ruled_out,
  *,
  max_new_tokens,
  top_k,
  nucleus,
  window,
):
  pad_id, guided = scalars["pad_id"], uncond is not None
  rows, first = prompt["tokens"].shape[0], window[0] if window else 0
  score = functools.partial(_logits, model, params)
  if window:
    score = _part_of_head(params, window)
  hidden, cache = _read_streams(model, params, prompt, uncond, max_new_tokens)

  def choose(logits, step):
    """float[(1 or 2) * B, V] to the next ids int32[B], log-probs [B]."""
    plain = jax.nn.log_softmax(logits[:rows])
    scores = plain
    if guided:
      scores = guide(plain, logits[rows:], scalars["guidance"][:, None])
    scores = process(scores, step, scalars, ruled_out, first)
    if keys is None:
      ids = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    else:
      ids = sample(
        keys,
        step,
        scores / scalars["temperature"],
        top_k,
        scalars["top_p"] if nucleus else None,
      )
    logprob = jnp.take_along_axis(plain, ids[:, None], axis=1)[:, 0]
    return ids + first, logprob

  def write(carry, logits):
    step, tokens, done, total = carry
    ids, logprob = choose(logits, step)
    ids = jnp.where(done, pad_id, ids)
    tokens = jax.lax.dynamic_update_slice(tokens, ids[:, None], (0, step))
    total = total + jnp.where(done, 0.0, logprob)
    done = done | (ids == scalars["eos_id"])
    return (step + 1, tokens, done, total), ids

  def body(carry):
    out, ids, cache = carry
    ids = jnp.concatenate([ids] * (1 + guided))
    hidden, cache = _step(model, params, ids, cache)
    out, ids = write(out, score(hidden))
    return out, ids, cache

  def going(carry):
    (step, _, done, _), _, _ = carry
    return (step < max_new_tokens) & ~done.all()

  tokens = jnp.full((rows, max_new_tokens), pad_id, jnp.int32)
  start = (jnp.int32(0), tokens, jnp.zeros(rows, bool), jnp.zeros(rows))
  out, ids = write(start, score(hidden))
  (steps, tokens, done, total), _, _ = jax.lax.while_loop(
    going, body, (out, ids, cache)
  )
  ended = tokens == scalars["eos_id"]
  lengths = jnp.where(done, ended.argmax(1) + 1, steps).astype(jnp.int32)
  total = jnp.full(rows, jnp.nan) if window else total
  return Generation(tokens, lengths, done, total)


def prefill(model, params, prompt, max_new_tokens: int):
  """Reads the prompts into a new cache with room for what is to come.

  Returns:
    (logits float32[B, V] after each prompt, the cache).
  """
  hidden, cache = _read(model, params, prompt, max_new_tokens)
  return _logits(model, params, hidden), cache


def advance(model, params, ids, cache):
  """One more token int[B] a row: (logits float32[B, V], the cache)."""
  hidden, cache = _step(model, params, ids, cache)
  return _logits(model, params, hidden), cache


def _read(model, params, prompt, room):
  """(hidden float[B, 1, D] after each prompt, a cache with `room`)."""
  batch, length = prompt["tokens"].shape
  cache = llama.init_cache(model.config, batch, length + room)
  hidden, cache = model.apply(
    {"params": params}, **prompt, cache=cache, return_hidden=True
  )
  return hidden[:, -1:], cache


def _step(model, params, ids, cache):
  """(hidden float[B, 1, D] after one more token int[B], the cache)."""
  return model.apply(
    {"params": params}, ids[:, None], cache=cache, return_hidden=True
  )


def _read_streams(model, params, prompt, uncond, room):
  """`_read` of both streams, each at its own length, as one batch.

  The unconditional stream may have one row for all, which is read once.
  """
  hidden, cache = _read(model, params, prompt, room)
  if uncond is None:
    return hidden, cache
  other, second = _read(model, params, uncond, room)
  rows = hidden.shape[0]
  slots = max(x["valid"].shape[1] for x in (cache, second))

  def join(name, slot_axis, row_axis):
    pair = []
    for x in (cache[name], second[name]):
      pad = [(0, 0)] * x.ndim
      pad[slot_axis] = (slots - x.shape[slot_axis], 0)  # on the left
      times = rows // x.shape[row_axis]
      pair.append(jnp.repeat(jnp.pad(x, pad), times, row_axis))
    return jnp.concatenate(pair, row_axis)

  joined = {"k": join("k", 3, 1), "v": join("v", 3, 1)}
  joined |= {"valid": join("valid", 1, 0), "index": jnp.int32(slots - room)}
  other = jnp.repeat(other, rows // other.shape[0], 0)
  return jnp.concatenate([hidden, other]), joined


def _part_of_head(params, window):
  """The function `_logits` for the rows `window` of the head alone."""
  first, last = window
  head, scale = params["head"][first:last], params.get("head_scale")
  scale = None if scale is None else scale[first:last]
  return lambda hidden: llama.project(hidden, head, scale)[:, 0]


def _logits(model, params, hidden):
  """float[B, 1, D] to float32[B, V]."""
  return model.apply({"params": params}, hidden, method="logits")[:, 0]


def guide(plain, uncond_logits, guidance):
  """Guided scores g * (s - u) + u of log-probs and logits float32[B, V]."""
  uncond = jax.nn.log_softmax(uncond_logits)
  return guidance * (plain - uncond) + uncond


def never_written(config: llama.LlamaConfig, suppress=None) -> np.ndarray:
  """bool[V], True at `suppress` bool[<= V] and at the padding of the head."""
  ruled_out = np.arange(config.padded_vocab) >= config.vocab_size
  if suppress is not None:
    suppress = np.asarray(suppress, bool)
    ruled_out[: len(suppress)] |= suppress
  return ruled_out


def process(scores, step, scalars, ruled_out, first: int = 0):
  """Rules out the eos too early, then suppressed ids: float32[B, V].

  `first` is the id that the first column stands for.
  """
  ids = jnp.arange(scores.shape[-1]) + first
  early = (ids == scalars["eos_id"]) & (step < scalars["min_new_tokens"])
  return jnp.where(early | ruled_out, _NEVER, scores)


def candidates(scores, top_k: int, top_p=None):
  """The ids that top-k, then top-p leave, likeliest first.

  Args:
    scores: float32[B, V], unnormalised log-probabilities.
    top_k: how many to keep, 0 for all.
    top_p: keep the smallest set of these that holds the probability `top_p`
      (the likeliest always stays); None keeps all.

  Returns:
    (scores float32[B, k], -inf where top-p cut; ids int32[B, k]).
  """
  scores, ids = jax.lax.top_k(scores, top_k or scores.shape[-1])
  if top_p is not None:
    probs = jax.nn.softmax(scores)
    before = jnp.cumsum(probs, axis=-1) - probs  # held by likelier ids
    before = before.at[:, 0].set(-1.0)
    scores = jnp.where(before < top_p, scores, _NEVER)
  return scores, ids


def sample(keys, step, scores, top_k: int = 0, top_p=None):
  """Draws int32[B] from scores float32[B, V], with a key for each row."""
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
  draw = jax.vmap(jax.random.categorical)
  if not top_k and top_p is None:
    return draw(keys, scores).astype(jnp.int32)
  scores, ids = candidates(scores, top_k, top_p)
  place = draw(keys, scores)
  return jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]


def _row_keys(rng, rows):
  """B keys from one key, or the B keys given."""
  if rng.ndim == (0 if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else 1):
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows))
  return rng


def arrays_of(prompt) -> dict[str, jax.Array]:
  """A prompt dict as arrays, with a mask bool[B, L]; what is None falls out."""
  prompt = {k: jnp.asarray(v) for k, v in prompt.items() if v is not None}
  if "mask" not in prompt:
    prompt["mask"] = jnp.ones(prompt["tokens"].shape, bool)
  return prompt | {"mask": prompt["mask"].astype(bool)}


def check_not_empty(prompt, max_new_tokens):
  """UsageError unless there is something to read and to write."""
  length = prompt["tokens"].shape[1]
  if length < 1 or max_new_tokens < 1:
    raise errors.UsageError(
      f"A prompt of {length} tokens and max_new_tokens={max_new_tokens}: both"
      " must be at least 1. Start an empty prompt with [IMG] or a word."
    )


def _check(prompt, uncond, guided, guidance_scale, max_new_tokens):
  """The number of rows; UsageError where the prompts do not go together."""
  rows = prompt["tokens"].shape[0]
  check_not_empty(prompt, max_new_tokens)
  if uncond is None and np.any(np.asarray(guidance_scale) != 1):
    raise errors.UsageError(
      f"guidance_scale={guidance_scale} needs the prompt of the unconditional"
      " stream. Give uncond (for images: [IMG] alone), or guidance_scale=1."
    )
  if guided and uncond["tokens"].shape[0] not in (1, rows):
    raise errors.UsageError(
      f"uncond has {uncond['tokens'].shape[0]} rows, the prompt {rows}: give"
      f" one row for all, or {rows}."
    )
  return rows


def _check_sampling(temperature, top_k, top_p):
  if float(temperature) < 0 or int(top_k) < 0 or not 0 < float(top_p) <= 1:
    raise errors.UsageError(
      f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected"
      " temperature >= 0 (0 is greedy), top_k >= 0 (0 is all), and top_p in"
      " (0, 1] (1 is all)."
    )
