"""Attention on GPU by cuDNN's flash kernel, through `jax.nn`.

The kernel never holds float32 logits of all heads. Packed rows and masked keys
need a mask bool[B, 1, L, M], one for all heads. The kernel is lowered only
where JAX's CUDA plugin is installed; elsewhere, and for shapes that it does
not support, attention is computed by einsums.
"""

import functools
import importlib.util

import jax

from lavit_jax.models.attention import mesh

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_DTYPES = ("bfloat16", "float16")
_MAX_HEAD_DIM = 128  # on GPUs before Hopper for every shape
_HEAD_DIM_STEP = 8
_LENGTH_STEP = 2  # odd lengths have no gradient
_MIN_LENGTH = 128  # shorter rows are not worth a kernel


def fits(query: jax.Array, key: jax.Array, *, causal: bool) -> bool:
  """Returns whether cuDNN supports float[B, L, H, Dh], float[B, M, G, Dh].

  Args:
    query: float[B, L, H, Dh].
    key: float[B, M, G, Dh].
    causal: whether a causal mask is applied; then L = M.
  """
  length, keys, dim = query.shape[1], key.shape[1], query.shape[3]
  return (
    _has_cudnn()
    and mesh.divides(query)
    and min(length, keys) >= _MIN_LENGTH
    and (length == keys or not causal)
    and query.dtype == key.dtype
    and query.dtype.name in _DTYPES
    and dim <= _MAX_HEAD_DIM
    and dim % _HEAD_DIM_STEP == 0
  )


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segments: mesh.SegmentIds | None,
  *,
  causal: bool,
) -> jax.Array:
  """Computes attention within segments; `fits` must be True.

  Args:
    query: float[B, L, H, Dh], already scaled.
    key: float[B, M, G, Dh].
    value: float[B, M, G, Dh].
    segments: int[B, L] and int[B, M], or None.
    causal: whether query i attends to keys 0 ... i only; then L = M.

  Returns:
    float[B, L, H, Dh] of the query's dtype; zeros where a query attends to no
    key.
  """
  step = mesh.ways()[1] * _LENGTH_STEP
  lengths = [-(-n // step) * step for n in (query.shape[1], key.shape[1])]
  form = functools.partial(_form, causal)
  return mesh.attend(
    form, query, key, value, segments, causal=causal, lengths=lengths
  )


def _form(causal, query, key, value, segments, shard, constants):
  """Runs the kernel on one device's shard; a `mesh.Form`."""
  del constants
  mask = None if segments is None else mesh.same_segment(segments)
  # Only a mask that cuDNN knows as causal lets it skip blocks above it.
  is_causal = causal and shard.count == 1
  if causal and not is_causal:
    not_later = mesh.causal_mask(query.shape[1], key.shape[1], shard)
    mask = not_later if mask is None else mask & not_later
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=mask,
    scale=1.0,
    is_causal=is_causal,
    implementation="cudnn",
  )


def _has_cudnn() -> bool:
  """Returns whether JAX can lower cuDNN's calls: its CUDA plugin has them."""
  return any(importlib.util.find_spec(name) for name in _PLUGINS)
