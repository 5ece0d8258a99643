"""The one decode engine, for text and for visual tokens.

Prefill, then a `lax.while_loop` over a static key-value cache. Guidance runs
the conditional and the unconditional stream as one batch of twice the rows.
Shapes are static: there is one compilation for each padded prompt shape and
`max_new_tokens`. Other searches use the parts `prefill`, `advance` and
`process`: beam search reorders the rows of the cache between two calls of
`advance`.
"""

import functools
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors
from lavit_jax.infer.decoding import checks, scoring
from lavit_jax.models import llama

Params = Any  # a tree of arrays
Prompt = checks.Prompt
Cache = dict[str, jax.Array]  # see `llama.init_cache`


class Generation(typing.NamedTuple):
  """The result of `generate`, a row for each prompt.

  Attributes:
    tokens: int32[B, max_new_tokens], the eos included, then padding.
    lengths: int32[B], number of generated tokens, the eos included.
    done: bool[B], True where the eos was generated.
    sum_logprobs: float32[B], log-probability of the generated tokens under
      the plain conditional model (no guidance, no temperature); NaN if it was
      not requested.
  """

  tokens: jax.Array
  lengths: jax.Array
  done: jax.Array
  sum_logprobs: jax.Array


def left_pad(
  rows: Sequence[Sequence[int]],
  length: int | None = None,
  multiple: int = 1,
  pad_id: int = 0,
) -> dict[str, np.ndarray]:
  """Pads prompts of different length on the left, to one batch.

  left_pad([[5, 6, 7], [8]]) gives tokens [[5, 6, 7], [0, 0, 8]] and mask
  [[1, 1, 1], [0, 0, 1]].

  Args:
    rows: lists of ids, none empty.
    length: of the result; by default the longest row.
    multiple: the length is rounded up to it (fewer shapes to compile).
    pad_id: the id at padding.

  Returns:
    dict(tokens int32[B, L], mask bool[B, L]), numpy.

  Raises:
    errors.UsageError: a row is empty, or longer than `length`.
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
  params: Params,
  *,
  prompt: Prompt,
  rng: jax.Array | None = None,
  max_new_tokens: int,
  min_new_tokens: int = 0,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  suppress: np.ndarray | None = None,
  eos_id: int,
  pad_id: int = 0,
  guidance_scale: jax.typing.ArrayLike = 1.0,
  uncond: Prompt | None = None,
  logprobs: bool = True,
) -> Generation:
  """Generates up to `max_new_tokens` tokens after each prompt.

  The operations follow the order of the official code: s =
  log_softmax(conditional), u = log_softmax(unconditional), s = g * (s - u) + u;
  the eos is ruled out before `min_new_tokens`; suppressed ids are ruled out;
  temperature; top-k; top-p.

  Args:
    model: hashable, static under jit.
    params: its parameters (what `init` returns under "params", unboxed).
    prompt: dict of tokens int[B, L], mask bool[B, L] (padding on the left)
      and, for continuous inputs, embeds float[B, L, D] and use_embeds
      bool[B, L].
    rng: a key, or B keys, one for each row, so that a sample does not depend
      on the batch. None: greedy.
    max_new_tokens: static.
    min_new_tokens: the eos is not among the first so many tokens.
    temperature: 0: greedy.
    top_k: static; sample from the k most probable ids, 0: from all.
    top_p: sample from the most probable ids that together have this
      probability, 1: from all.
    suppress: bool[V], ids that are never generated; V is at most the padded
      vocabulary.
    eos_id: ends a row.
    pad_id: fills a row after its end.
    guidance_scale: g, a scalar or float[B]; 1 is off.
    uncond: the prompt dict of the unconditional stream, B rows or one.
    logprobs: static; False leaves `sum_logprobs` out. Then the head is only
      multiplied between the first and the last id that is allowed, a third of
      it for images. The ids are the same: the rest of the vocabulary shifts
      all scores of a row alike.

  Raises:
    errors.UsageError: arguments that do not go together.
  """
  guided = uncond is not None and bool(np.any(np.asarray(guidance_scale) != 1))
  sampled = rng is not None and float(temperature) > 0
  keys = None
  if rng is not None and sampled:
    keys = scoring.row_keys(rng, len(prompt["tokens"]))
  rows = checks.count_rows(
    prompt, uncond, guided, guidance_scale, max_new_tokens
  )
  checks.check_sampling(temperature, top_k, top_p)
  ruled_out = scoring.suppressed_ids(model.config, suppress)
  scalars = {
    "min_new_tokens": np.int32(min_new_tokens),
    "temperature": np.float32(temperature if sampled else 1.0),
    "top_p": np.float32(top_p),
    "eos_id": np.int32(eos_id),
    "pad_id": np.int32(pad_id),
    "guidance": np.full(rows, guidance_scale, np.float32),
  }
  window = None if logprobs else _window(ruled_out)
  first, last = window or (0, model.config.padded_vocab)
  return _generate(
    model,
    params,
    arrays_of(prompt),
    None if uncond is None or not guided else arrays_of(uncond),
    keys,
    scalars,
    ruled_out[first:last],
    max_new_tokens=int(max_new_tokens),
    top_k=min(int(top_k), last - first) if sampled else 0,
    nucleus=sampled and float(top_p) < 1,
    window=window,
  )


def _window(ruled_out) -> tuple[int, int]:
  """Returns (first, last + 1) of the ids that are allowed."""
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
  """Reads the prompts and generates token by token, as one program.

  Args:
    model: see `generate`, as for params, prompt and uncond.
    params: of the model.
    prompt: arrays.
    uncond: arrays, or None: not guided.
    keys: one for each row; None is greedy.
    scalars: all other numbers, which may change freely.
    ruled_out: bool[V], ids that are never generated.
    max_new_tokens: static.
    top_k: static.
    nucleus: whether `top_p` of the scalars cuts.
    window: (first, last + 1) of the only ids that are scored; None: all.

  Returns:
    A `Generation`.
  """
  pad_id, guided = scalars["pad_id"], uncond is not None
  rows, first = prompt["tokens"].shape[0], window[0] if window else 0
  score = functools.partial(_logits, model, params)
  if window:
    score = _windowed_logits(params, window)
  hidden, cache = _read_streams(model, params, prompt, uncond, max_new_tokens)

  def choose(logits, step):
    """Maps float[(1 or 2) * B, V] to ids int32[B] and log-probs [B]."""
    plain = jax.nn.log_softmax(logits[:rows])
    scores = plain
    if guided:
      scores = scoring.guide(plain, logits[rows:], scalars["guidance"][:, None])
    scores = scoring.process(scores, step, scalars, ruled_out, first)
    if keys is None:
      ids = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    else:
      ids = scoring.sample(
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


def prefill(
  model: llama.Llama, params: Params, prompt: Prompt, max_new_tokens: int
) -> tuple[jax.Array, Cache]:
  """Reads the prompts into a new cache.

  Args:
    model: the language model.
    params: its parameters.
    prompt: as `generate` takes it, from `arrays_of`.
    max_new_tokens: slots of the cache beside those of the prompt.

  Returns:
    (logits float32[B, V] after each prompt, the cache).
  """
  hidden, cache = _read(model, params, prompt, max_new_tokens)
  return _logits(model, params, hidden), cache


def advance(
  model: llama.Llama, params: Params, ids: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
  """Reads one more token for each row.

  Args:
    model: the language model.
    params: its parameters.
    ids: int[B].
    cache: from `prefill` or the last call.

  Returns:
    (logits float32[B, V], the cache).
  """
  hidden, cache = _step(model, params, ids, cache)
  return _logits(model, params, hidden), cache


def _read(model, params, prompt, room):
  """Returns (hidden float[B, 1, D] after each prompt, a new cache)."""
  batch, length = prompt["tokens"].shape
  cache = llama.init_cache(model.config, batch, length + room)
  hidden, cache = model.apply(
    {"params": params}, **prompt, cache=cache, return_hidden=True
  )
  return hidden[:, -1:], cache


def _step(model, params, ids, cache):
  """Returns (hidden float[B, 1, D] after one more token int[B], cache)."""
  return model.apply(
    {"params": params}, ids[:, None], cache=cache, return_hidden=True
  )


def _read_streams(model, params, prompt, uncond, room):
  """Reads both streams, each at its own length, and joins them to one batch.

  An unconditional stream of one row for all is read once.
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


def _windowed_logits(params, window):
  """Returns a function like `_logits`, for the rows `window` of the head."""
  first, last = window
  head, scale = params["head"][first:last], params.get("head_scale")
  scale = None if scale is None else scale[first:last]
  return lambda hidden: llama.project(hidden, head, scale)[:, 0]


def _logits(model, params, hidden):
  """Maps hidden float[B, 1, D] to float32[B, V]."""
  return model.apply({"params": params}, hidden, method="logits")[:, 0]


def arrays_of(prompt: Prompt) -> dict[str, jax.Array | np.ndarray]:
  """Returns the arrays of a prompt that are not None, and a mask bool[B, L].

  NumPy arrays stay so until a program takes them: each operation on the device
  would be a program of its own to compile.
  """
  arrays = {k: v for k, v in prompt.items() if v is not None}
  mask = arrays.get("mask", np.ones(arrays["tokens"].shape, bool))
  return arrays | {"mask": mask.astype(bool)}
