"""Scores of the next token: guidance, ids that are ruled out, sampling."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.models import llama

_NEVER = -jnp.inf


def guide(
  plain: jax.Array, uncond_logits: jax.Array, guidance: jax.Array | float
) -> jax.Array:
  """Computes guided scores g * (s - u) + u, float32[B, V].

  Args:
    plain: s, conditional log-probabilities float32[B, V].
    uncond_logits: float32[B, V]; their log_softmax is u.
    guidance: g, a scalar or float[B, 1].
  """
  uncond = jax.nn.log_softmax(uncond_logits)
  return guidance * (plain - uncond) + uncond


def suppressed_ids(
  config: llama.LlamaConfig, suppress: np.ndarray | None = None
) -> np.ndarray:
  """Returns bool[V]: `suppress` bool[<= V], and the padding of the head."""
  ruled_out = np.arange(config.padded_vocab) >= config.vocab_size
  if suppress is not None:
    suppress = np.asarray(suppress, bool)
    ruled_out[: len(suppress)] |= suppress
  return ruled_out


def process(
  scores: jax.Array,
  step: jax.typing.ArrayLike,
  scalars: Mapping[str, Any],
  ruled_out: jax.typing.ArrayLike,
  first: int = 0,
) -> jax.Array:
  """Rules out an early eos, then suppressed ids.

  Args:
    scores: float32[B, V].
    step: int[], number of new tokens so far.
    scalars: with eos_id and min_new_tokens.
    ruled_out: bool[V].
    first: the id of the first column.

  Returns:
    float32[B, V], -inf at ids that are ruled out.
  """
  ids = jnp.arange(scores.shape[-1]) + first
  early = (ids == scalars["eos_id"]) & (step < scalars["min_new_tokens"])
  return jnp.where(early | ruled_out, _NEVER, scores)


def candidates(
  scores: jax.Array, top_k: int, top_p: jax.typing.ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
  """Applies top-k, then top-p.

  Args:
    scores: float32[B, V], unnormalised log-probabilities.
    top_k: number of ids to keep, 0: all.
    top_p: keep the smallest set of these with at least this probability (the
      most probable id always stays); None keeps all.

  Returns:
    (scores float32[B, k], -inf where top-p cut; ids int32[B, k]), the most
    probable first.
  """
  scores, ids = jax.lax.top_k(scores, top_k or scores.shape[-1])
  if top_p is not None:
    probs = jax.nn.softmax(scores)
    before = jnp.cumsum(probs, axis=-1) - probs  # of the more probable ids
    before = before.at[:, 0].set(-1.0)
    scores = jnp.where(before < top_p, scores, _NEVER)
  return scores, ids


def sample(
  keys: jax.Array,
  step: jax.typing.ArrayLike,
  scores: jax.Array,
  top_k: int = 0,
  top_p: jax.typing.ArrayLike | None = None,
) -> jax.Array:
  """Samples one id for each row: int32[B].

  Args:
    keys: B keys.
    step: int[], folded into the keys.
    scores: float32[B, V], unnormalised log-probabilities.
    top_k: see `candidates`.
    top_p: see `candidates`.
  """
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
  draw = jax.vmap(jax.random.categorical)
  if not top_k and top_p is None:
    return draw(keys, scores).astype(jnp.int32)
  scores, ids = candidates(scores, top_k, top_p)
  index = draw(keys, scores)
  return jnp.take_along_axis(ids, index[:, None], axis=1)[:, 0]


def row_keys(rng: jax.Array, rows: int) -> jax.Array:
  """Returns B keys, folded from one key if `rng` is one."""
  if rng.ndim == (0 if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else 1):
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows))
  return rng
