"""The forms in which attention is computed; `layers.attention` is the entry.

On a CPU logits that outgrow the caches take most of the time, so there they
are made row by row or block by block; everywhere else in one piece.
"""

import functools

import jax
import jax.numpy as jnp

from lavit_jax.core import sharding

_LARGE_LOGITS = 1 << 23  # bytes


def attend(query, key, value, seen, policy, policy_eps: float):
  """Attention of scaled queries, by the form that is the fastest here.

  Args:
    query: float[B, L, H, Dh], times the scale.
    key: float[B, M, G, Dh].
    value: float[B, M, G, Dh].
    seen: bool[B | 1, H | 1, L | 1, M] or None.
    policy: float, likewise, or None.
    policy_eps: see `policy_softmax`.

  Returns:
    float[B, L, H, Dh] of the query's dtype.
  """
  rest = (query, key, value, seen, policy)
  batch, length, heads, _ = query.shape
  size = 4 * length * heads * key.shape[1]  # bytes of a row's logits
  whole = functools.partial(_whole, policy_eps)
  if sharding.ways("act_batch") > 1:
    return whole(*rest)  # a loop over rows would gather them all everywhere
  if size >= _LARGE_LOGITS and policy is None:
    small = _by_block
  elif batch > 1 and size * batch >= _LARGE_LOGITS:
    small = functools.partial(_by_row, policy_eps)
  else:
    return whole(*rest)
  return jax.lax.platform_dependent(*rest, cpu=small, default=whole)


def _whole(policy_eps, query, key, value, seen, policy):
  """`attention` of scaled queries; seen and policy [B | 1, …] or None."""
  logits = _logits(query, key)  # [B, H, L, M]
  if policy is None:
    weights = masked_softmax(logits, seen)
  else:
    policy = policy if seen is None else policy * seen
    weights = policy_softmax(logits, policy, policy_eps)
  return _mix(weights.astype(query.dtype), value)


def _by_row(policy_eps, query, key, value, seen, policy):
  """`_whole` row by row: logits stay in a CPU's caches, twice as fast."""

  def widen(x):
    return None if x is None else jnp.broadcast_to(x, (rows, *x.shape[1:]))

  def one(row):
    arrays = [None if x is None else x[None] for x in row]
    return _whole(policy_eps, *arrays)[0]

  rows = query.shape[0]
  return jax.lax.map(one, (query, key, value, widen(seen), widen(policy)))


def _by_block(query, key, value, seen, policy):
  """`_whole` without a policy, one head and some queries at a time.

  At 4096 places 2 to 3 times as fast; blocks of keys as well gain nothing.
  """
  del policy
  (batch, length, heads, dim), keys = query.shape, key.shape[1]
  block = min(length, max(_LARGE_LOGITS // (4 * keys), 1))
  count = -(-length // block)
  rest = count * block - length
  query = jnp.pad(query, ((0, 0), (0, rest), (0, 0), (0, 0)))
  shape = (batch * heads, count, block, dim)
  query = query.transpose(0, 2, 1, 3).reshape(shape)
  if seen is not None and seen.shape[2] > 1:
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, rest), (0, 0)))

  def head(given):
    number, query = given
    row, column = number // heads, number % heads
    mine = column * key.shape[2] // heads
    k, v = key[row, :, mine], value[row, :, mine]  # [M, Dh]
    mask = None
    if seen is not None:
      mask = seen[row % seen.shape[0], column % seen.shape[1]]  # [L | 1, M | 1]

    def some(given):
      start, query = given
      one = mask
      if mask is not None and mask.shape[0] > 1:
        one = jax.lax.dynamic_slice_in_dim(mask, start, block)
      logits = jnp.einsum(
        "ld,md->lm", query, k, preferred_element_type=jnp.float32
      )
      return masked_softmax(logits, one).astype(v.dtype) @ v

    return jax.lax.map(some, (jnp.arange(count) * block, query))

  out = jax.lax.map(head, (jnp.arange(batch * heads), query))
  out = out.reshape(batch, heads, count * block, dim)[:, :, :length]
  return out.transpose(0, 2, 1, 3)


def is_of_keys(mask, causal: bool, segment_ids) -> bool:
  """Whether `segments`, and an order, say all of what is to be seen."""
  if mask is None:
    return True
  return not causal and segment_ids is None and mask.shape[1:3] == (1, 1)


def segments(query, key, mask, segment_ids):
  """Ids whose equality says what is seen: int[B, L] and int[B, M], or None.

  Args:
    query: float[B, L, H, Dh].
    key: float[B, M, G, Dh].
    mask: bool[B | 1, 1, 1, M | 1] or None.
    segment_ids: int[B, L], where there is no mask, or None.
  """
  if segment_ids is not None:
    return segment_ids, segment_ids
  if mask is None:
    return None
  batch, length = query.shape[:2]
  keys = jnp.broadcast_to(mask[:, 0, 0], (batch, key.shape[1]))
  return jnp.ones((batch, length), jnp.int32), keys.astype(jnp.int32)


def combine(query, key, mask, causal, segment_ids):
  """One bool mask [B | 1, H | 1, L | 1, M] or None."""
  length, keys = query.shape[1], key.shape[1]
  seen = mask
  if causal:
    order = jnp.tril(jnp.ones((length, keys), bool), keys - length)
    seen = order[None, None] if seen is None else seen & order
  if segment_ids is not None:
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    seen = same if seen is None else seen & same
  return seen


def _logits(query, key):
  """float32[B, H, L, M] products of float[B, L, H, Dh], float[B, M, G, Dh]."""
  batch, length, heads, dim = query.shape
  groups = key.shape[2]
  float32 = jnp.float32
  if groups == heads:
    return jnp.einsum(
      "blhd,bmhd->bhlm", query, key, preferred_element_type=float32
    )
  query = query.reshape(batch, length, groups, heads // groups, dim)
  out = jnp.einsum(
    "blgrd,bmgd->bgrlm", query, key, preferred_element_type=float32
  )
  return out.reshape(batch, heads, length, key.shape[1])


def _mix(weights, value):
  """float[B, L, H, Dh] of weights [B, H, L, M] and values [B, M, G, Dh]."""
  batch, heads, length, keys = weights.shape
  groups, dim = value.shape[2:]
  if groups == heads:
    return jnp.einsum("bhlm,bmhd->blhd", weights, value)
  weights = weights.reshape(batch, groups, heads // groups, length, keys)
  out = jnp.einsum("bgrlm,bmgd->blgrd", weights, value)
  return out.reshape(batch, length, heads, dim)


def masked_softmax(logits: jax.Array, seen: jax.Array | None) -> jax.Array:
  """Softmax of float32[..., M] over the keys seen; zeros where none is."""
  if seen is None:
    return jax.nn.softmax(logits, axis=-1)
  lowest = jnp.finfo(logits.dtype).min
  weights = jax.nn.softmax(jnp.where(seen, logits, lowest), axis=-1)
  return jnp.where(seen.any(-1, keepdims=True), weights, 0.0)


def policy_softmax(
  logits: jax.Array, policy: jax.Array, eps: float
) -> jax.Array:
  """LaVIT's softmax with a policy, differentiable in the policy.

  e = exp(a - max over all keys) * policy, then (e + eps / M) / (sum e + eps).
  With eps > 0 every key keeps a little weight, masked ones too (the official
  code's). With eps = 0 it is the softmax over the keys of policy > 0, and the
  mean over all keys where there is none, the limit of the form above.

  Args:
    logits: float32[B, H, L, M].
    policy: float, broadcastable to it, in 0 ... 1.
    eps: a constant >= 0.

  Returns:
    float32[B, H, L, M] whose last axis sums to one.
  """
  keys = logits.shape[-1]
  highest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  weights = jnp.exp(logits - highest) * policy
  total = weights.sum(-1, keepdims=True)
  if eps:
    return (weights + eps / keys) / (total + eps)
  some = total > 0
  return jnp.where(some, weights / jnp.where(some, total, 1.0), 1.0 / keys)
