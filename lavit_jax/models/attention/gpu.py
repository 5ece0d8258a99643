"""Attention on GPU by cuDNN's flash kernel, through `jax.nn`.

It never holds float32 logits of all heads. Of packed rows and keys that are
not to be seen it wants a mask, bool[B, 1, L, M], one for all heads. It is
lowered only where JAX's CUDA plugin is installed; elsewhere, and for what it
does not take, attention is that of einsums.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from lavit_jax.models.attention import mesh

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_DTYPES = ("bfloat16", "float16")
_HEAD_DIM = 128  # the widest; on GPUs before Hopper for every shape
_HEAD_STEP = 8
_STEP = 2  # in which rows must be long, or their gradient is refused
_LEAST = 128  # places of a row from which it is worth a kernel


def fits(query: jax.Array, key: jax.Array, *, causal: bool) -> bool:
  """Whether cuDNN takes float[B, L, H, Dh] and float[B, M, G, Dh].

  Args:
    query: float[B, L, H, Dh].
    key: float[B, M, G, Dh].
    causal: whether places are compared; then L = M.
  """
  length, keys, dim = query.shape[1], key.shape[1], query.shape[3]
  return (
    _has_cudnn()
    and mesh.divides(query)
    and min(length, keys) >= _LEAST
    and (length == keys or not causal)
    and query.dtype == key.dtype
    and query.dtype.name in _DTYPES
    and dim <= _HEAD_DIM
    and dim % _HEAD_STEP == 0
  )


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segments: tuple[jax.Array, jax.Array] | None,
  *,
  causal: bool,
) -> jax.Array:
  """Attention inside segments; `fits` must be True.

  Args:
    query: float[B, L, H, Dh], times the scale.
    key: float[B, M, G, Dh].
    value: float[B, M, G, Dh].
    segments: int[B, L] and int[B, M], or None.
    causal: whether query i sees only keys 0 ... i; then L = M.

  Returns:
    float[B, L, H, Dh] of the query's dtype; zeros where a query sees no key.
  """
  step = mesh.ways()[1] * _STEP
  length = query.shape[1]
  lengths = [-(-n // step) * step for n in (length, key.shape[1])]
  out = mesh.attend(
    functools.partial(_form, causal),
    *mesh.fill(query, key, value, segments, lengths, causal=causal),
  )[:, :length]
  if segments is None or causal:  # each query sees a key, itself at least
    return out
  return jnp.where(mesh.blind(segments), 0, out)


def _form(causal, query, key, value, segments, part, constants):
  """The kernel on one device's share; see `mesh.attend`."""
  del constants
  seen = None if segments is None else mesh.same(segments)
  alone = causal and part.count == 1  # then blocks above it are skipped
  if causal and not alone:
    order = mesh.causal(query.shape[1], key.shape[1], part)
    seen = order if seen is None else seen & order
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=seen,
    scale=1.0,
    is_causal=alone,
    implementation="cudnn",
  )


def _has_cudnn() -> bool:
  """Whether JAX can lower cuDNN's calls: its CUDA plugin brings them."""
  return any(importlib.util.find_spec(name) for name in _PLUGINS)
