"""Positions, masks and cache that the layers of a language model share.

A row is computed as a whole (`of_rows`), or token by token with the keys and
values of the tokens before it in a cache (`of_cache`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Cache = dict[str, jax.Array]  # see `llama.init_cache`


def positions_of(
  mask: jax.Array | None = None, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Returns positions int32[B, L]: they count valid tokens in each segment.

  The mask [0, 0, 1, 1, 1] gives [0, 0, 0, 1, 2]; the segment ids
  [1, 1, 2, 2, 2] give [0, 1, 0, 1, 2].

  Args:
    mask: bool[B, L], False at padding; used if there are no segments.
    segment_ids: int[B, L]; positions restart with each segment.
  """
  if segment_ids is not None:
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    first = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    return index - start
  if mask is None:
    raise ValueError("positions_of needs a mask or segment_ids: give one.")
  return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)


@dataclasses.dataclass(frozen=True)
class Context:
  """Inputs that all layers share: a pytree, broadcast over the scan."""

  positions: jax.Array  # int32[B, L]
  mask: jax.Array | None  # bool[B, 1, 1 | L, M]
  segment_ids: jax.Array | None  # int32[B, L]
  index: jax.Array | None  # int32[], with a cache: the first slot to write


jax.tree_util.register_dataclass(
  Context,
  data_fields=["positions", "mask", "segment_ids", "index"],
  meta_fields=[],
)


def update_cache(
  cache: tuple[jax.Array, ...],
  new: tuple[jax.Array, ...],
  layer: Any,
  index: Any,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
  """Writes keys and values of a layer to the cache and reads all it has.

  Args:
    cache: two arrays [layers, B, G, M, Dh].
    new: two arrays [B, L, G, Dh].
    layer: int32[], the number of the layer.
    index: int32[], the first slot to write; L slots are written.

  Returns:
    The new cache, and two arrays [B, M, G, Dh].
  """
  cache = tuple(
    jax.lax.dynamic_update_slice(
      old,
      x.swapaxes(1, 2)[None].astype(old.dtype),
      (layer, 0, 0, index, 0),
    )
    for old, x in zip(cache, new, strict=True)
  )
  held = tuple(
    jax.lax.dynamic_index_in_dim(x, layer, keepdims=False).swapaxes(1, 2)
    for x in cache
  )
  return cache, held


def of_rows(
  x: jax.Array,
  positions: jax.Array | None,
  segment_ids: jax.Array | None,
  mask: jax.Array | None,
) -> Context:
  """Returns the context of whole rows; arguments as of `llama.Llama`."""
  if positions is None and mask is None and segment_ids is None:
    index = jnp.arange(x.shape[1], dtype=jnp.int32)
    positions = jnp.broadcast_to(index, x.shape[:2])
  elif positions is None:
    positions = positions_of(mask, segment_ids)
  mask = None if mask is None else mask[:, None, None, :]
  return Context(positions, mask, segment_ids, None)


def of_cache(
  cache: Cache,
  x: jax.Array,
  positions: jax.Array | None,
  mask: jax.Array | None,
) -> tuple[Context, Cache]:
  """Returns the context of tokens that go into a cache, and the cache.

  Args:
    cache: of `llama.init_cache`.
    x: float[B, L, D] of the new tokens.
    positions: int[B, L], by default counted on from the cache.
    mask: bool[B, L], False at padding; None without any.

  Returns:
    The context, and the cache with the slots of the new tokens valid.
  """
  batch, length = x.shape[:2]
  index = cache["index"]
  if mask is None:
    mask = jnp.ones((batch, length), bool)
  valid = jax.lax.dynamic_update_slice(cache["valid"], mask, (0, index))
  if positions is None:
    before = cache["valid"].sum(1, dtype=jnp.int32, keepdims=True)
    counted = jnp.cumsum(mask.astype(jnp.int32), axis=1)
    positions = jnp.maximum(before + counted - 1, 0)
  slots = jnp.arange(valid.shape[1])
  not_later = slots <= index + jnp.arange(length)[:, None]  # [L, M]
  mask = not_later[None, None] & valid[:, None, None]
  return Context(positions, mask, None, index), cache | {"valid": valid}
