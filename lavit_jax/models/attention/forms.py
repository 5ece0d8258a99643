"""Attention by einsums; `layers.attention` is the entry point.

On a CPU, logits that outgrow the caches take most of the time, so there they
are computed row by row or block by block; everywhere else all at once.
"""

import contextlib
import functools

import einops
import jax
import jax.numpy as jnp

from lavit_jax.core import sharding

_LARGE_LOGITS = 1 << 23  # bytes


def scope(causal: bool, keys: int) -> contextlib.AbstractContextManager:
  """The named scope of attention; a causal one says over how many keys.

  `cost.scopes` reads it: half of the logits of causal attention are masked.
  """
  name = f"causal_over_{keys}_keys" if causal else "attention"
  return jax.named_scope(name)


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None,
  policy: jax.Array | None,
  policy_eps: float,
) -> jax.Array:
  """Computes attention of scaled queries, by the fastest form for them.

  Args:
    query: float[B, L, H, Dh], already scaled.
    key: float[B, M, G, Dh].
    value: float[B, M, G, Dh].
    mask: bool[B | 1, H | 1, L | 1, M], False for masked keys, or None.
    policy: float[B | 1, H | 1, L | 1, M] or None.
    policy_eps: see `policy_softmax`.

  Returns:
    float[B, L, H, Dh] of the query's dtype.
  """
  arrays = (query, key, value, mask, policy)
  batch, length, heads, _ = query.shape
  size = 4 * length * heads * key.shape[1]  # bytes of a row's logits
  at_once = functools.partial(_at_once, policy_eps)
  if sharding.ways("act_batch") > 1:
    return at_once(*arrays)  # a loop would gather all rows on every device
  if size >= _LARGE_LOGITS and policy is None:
    on_cpu = _by_block
  elif batch > 1 and size * batch >= _LARGE_LOGITS:
    on_cpu = functools.partial(_by_row, policy_eps)
  else:
    return at_once(*arrays)
  return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=at_once)


def _at_once(policy_eps, query, key, value, mask, policy):
  """Computes all logits at once."""
  logits = _logits(query, key)  # [B, H, L, M]
  if policy is None:
    weights = masked_softmax(logits, mask)
  else:
    policy = policy if mask is None else policy * mask
    weights = policy_softmax(logits, policy, policy_eps)
  return _mix(weights.astype(query.dtype), value)


def _by_row(policy_eps, query, key, value, mask, policy):
  """Computes row by row: logits stay in a CPU's caches, twice as fast."""

  def broadcast(x):
    return None if x is None else jnp.broadcast_to(x, (rows, *x.shape[1:]))

  def attend_row(row):
    arrays = [None if x is None else x[None] for x in row]
    return _at_once(policy_eps, *arrays)[0]

  rows = query.shape[0]
  rest = broadcast(mask), broadcast(policy)
  return jax.lax.map(attend_row, (query, key, value, *rest))


def _by_block(query, key, value, mask, policy):
  """Computes without a policy, one head and a block of queries at a time.

  At 4096 positions it is 2 to 3 times as fast as `_at_once`; blocks of keys as
  well gain nothing.
  """
  del policy
  (batch, length, heads, dim), keys = query.shape, key.shape[1]
  block = min(length, max(_LARGE_LOGITS // (4 * keys), 1))
  count = -(-length // block)
  padding = count * block - length
  query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
  query = einops.rearrange(query, "b (n l) h d -> (b h) n l d", l=block)
  if mask is not None and mask.shape[2] > 1:
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, padding), (0, 0)))

  def attend_head(index_and_query):
    index, query = index_and_query  # of B * H, [count, block, Dh]
    row, head = index // heads, index % heads
    group = head * key.shape[2] // heads
    k, v = key[row, :, group], value[row, :, group]  # [M, Dh]
    head_mask = None
    if mask is not None:  # [L | 1, M | 1]
      head_mask = mask[row % mask.shape[0], head % mask.shape[1]]

    def attend_block(start_and_query):
      start, query = start_and_query
      block_mask = head_mask
      if head_mask is not None and head_mask.shape[0] > 1:
        block_mask = jax.lax.dynamic_slice_in_dim(head_mask, start, block)
      logits = jnp.einsum(
        "ld,md->lm", query, k, preferred_element_type=jnp.float32
      )
      return masked_softmax(logits, block_mask).astype(v.dtype) @ v

    return jax.lax.map(attend_block, (jnp.arange(count) * block, query))

  out = jax.lax.map(attend_head, (jnp.arange(batch * heads), query))
  out = out.reshape(batch, heads, count * block, dim)[:, :, :length]
  return out.transpose(0, 2, 1, 3)


def is_key_mask(
  mask: jax.Array | None, causal: bool, segment_ids: jax.Array | None
) -> bool:
  """Returns whether `segments` and a causal mask can express the masks."""
  if mask is None:
    return True
  return not causal and segment_ids is None and mask.shape[1:3] == (1, 1)


def segments(
  query: jax.Array,
  key: jax.Array,
  mask: jax.Array | None,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array] | None:
  """Expresses a mask of keys, or segment ids, as ids of queries and keys.

  Args:
    query: float[B, L, H, Dh].
    key: float[B, M, G, Dh].
    mask: bool[B | 1, 1, 1, M | 1] or None.
    segment_ids: int[B, L], if there is no mask, or None.

  Returns:
    int[B, L] and int[B, M]: a query attends to the keys of equal id. None
    where every query attends to every key.
  """
  if segment_ids is not None:
    return segment_ids, segment_ids
  if mask is None:
    return None
  batch, length = query.shape[:2]
  keys = jnp.broadcast_to(mask[:, 0, 0], (batch, key.shape[1]))
  return jnp.ones((batch, length), jnp.int32), keys.astype(jnp.int32)


def combined_mask(
  query: jax.Array,
  key: jax.Array,
  mask: jax.Array | None,
  causal: bool,
  segment_ids: jax.Array | None,
) -> jax.Array | None:
  """Returns all masks as one bool[B | 1, H | 1, L | 1, M], or None."""
  length, keys = query.shape[1], key.shape[1]
  if causal:
    not_later = jnp.tril(jnp.ones((length, keys), bool), keys - length)
    mask = not_later[None, None] if mask is None else mask & not_later
  if segment_ids is not None:
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    mask = same if mask is None else mask & same
  return mask


def _logits(query, key):
  """Returns products float32[B, H, L, M] of [B, L, H, Dh] and [B, M, G, Dh]."""
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
  """Returns the sum [B, L, H, Dh] of values [B, M, G, Dh] by [B, H, L, M]."""
  batch, heads, length, keys = weights.shape
  groups, dim = value.shape[2:]
  if groups == heads:
    return jnp.einsum("bhlm,bmhd->blhd", weights, value)
  weights = weights.reshape(batch, groups, heads // groups, length, keys)
  out = jnp.einsum("bgrlm,bmgd->blgrd", weights, value)
  return out.reshape(batch, length, heads, dim)


def masked_softmax(logits: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Softmax of float32[..., M] over unmasked keys; zeros if all are masked."""
  if mask is None:
    return jax.nn.softmax(logits, axis=-1)
  lowest = jnp.finfo(logits.dtype).min
  weights = jax.nn.softmax(jnp.where(mask, logits, lowest), axis=-1)
  return jnp.where(mask.any(-1, keepdims=True), weights, 0.0)


def policy_softmax(
  logits: jax.Array, policy: jax.Array, eps: float
) -> jax.Array:
  """Computes LaVIT's softmax with a policy, differentiable in the policy.

  With logits a: e = exp(a - max over all keys) * policy, then the weights are
  (e + eps / M) / (sum e + eps). With eps > 0 every key keeps a little weight,
  masked ones too, as in the official code. With eps = 0 it is the softmax over
  the keys of policy > 0; where there is none it is the mean over all keys, the
  limit for eps -> 0.

  Args:
    logits: float32[B, H, L, M].
    policy: float in 0 ... 1, broadcastable to the logits.
    eps: a constant, at least 0.

  Returns:
    float32[B, H, L, M] whose last axis sums to one.
  """
  keys = logits.shape[-1]
  highest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  weights = jnp.exp(logits - highest) * policy
  total = weights.sum(-1, keepdims=True)
  if eps:
    return (weights + eps / keys) / (total + eps)
  any_key = total > 0
  total = jnp.where(any_key, total, 1.0)
  return jnp.where(any_key, weights / total, 1.0 / keys)
