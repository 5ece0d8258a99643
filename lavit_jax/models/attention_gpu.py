"""Causal self-attention of packed rows on GPU: Pallas' kernel in Triton.

Like `attention_tpu` it never holds the logits and takes segment ids. It needs
no GPU to be lowered, which cuDNN's (`implementation="cudnn"`) does; that one
takes no segment ids, so it is for rows of one document each.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as pallas

from lavit_jax.models import attention_mesh

_BLOCK = 128
_HEAD_DIMS = (16, 128)  # the least that the matrix units take; what is held


def fits(query: jax.Array, key: jax.Array) -> bool:
  """Whether the kernel takes float[B, L, H, Dh] and float[B, L, G, Dh].

  It sees whole rows only: a mesh that splits the sequence is left to XLA.
  """
  least, most = _HEAD_DIMS
  return (
    attention_mesh.fits(query, key)
    and attention_mesh.ways()[1] == 1
    and query.shape[1] % _BLOCK == 0
    and query.shape[1] > 0
    and least <= query.shape[3] <= most
  )


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Causal self-attention inside segments; `fits` must be True.

  Args:
    query: float[B, L, H, Dh], times the scale.
    key: float[B, L, G, Dh].
    value: float[B, L, G, Dh].
    segment_ids: int[B, L] or None.
    interpret: run the kernel's Python, anywhere: for tests.

  Returns:
    float[B, L, H, Dh] of the query's dtype.
  """
  form = functools.partial(_form, interpret)
  return attention_mesh.attend(form, query, key, value, segment_ids)


def _form(interpret, query, key, value, segments, every, index, axis):
  """The kernel on one device's share; see `attention_mesh.attend`."""
  del every, index, axis
  repeats = query.shape[2] // key.shape[2]
  if repeats > 1:  # the kernel has one key head a query head
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
  return pallas.mha(
    query,
    key,
    value,
    segments,
    sm_scale=1.0,
    causal=True,
    interpret=interpret,
  )
