"""Attention with its projections, as the vision transformers here have it."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models import layers, matmul

# lecun_normal over [D, 3, H * Dh]: the fan-in is the first axis alone.
_QKV_INIT = nn.initializers.variance_scaling(
  1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=(1, 2)
)


class SelfAttention(nn.Module):
  """Fused q, k, v; attention; output projection.

  The three kernels lie on an axis of their own, `qkv_kernel` [D, 3, D], so
  that a split over heads never cuts across q, k and v. EVA's keys have no
  bias (`key_bias=False`): its biases are `q_bias` and `v_bias`.
  """

  num_heads: int
  key_bias: bool = True
  dtype: Any = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, **kwargs) -> jax.Array:
    """Maps float[B, L, D] to the same; kwargs go to `layers.attention`."""
    batch, length, width = x.shape
    boxed = nn.with_logical_partitioning
    kernel = self.param(
      "qkv_kernel",
      boxed(_QKV_INIT, ("embed", "qkv", "heads")),
      (width, 3, width),
    )
    dtype = jnp.dtype(self.dtype)
    kernel = kernel.astype(dtype).reshape(width, 3 * width)
    qkv = matmul.linear(x.astype(dtype), kernel)
    qkv = qkv + self._bias(width).astype(dtype)
    qkv = qkv.reshape(batch, length, 3, self.num_heads, -1)
    out = layers.attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], **kwargs)
    out = out.reshape(batch, length, width)
    axes = ("heads", "embed")
    return layers.dense(width, axes, dtype=dtype, name="proj")(out)

  def _bias(self, width):
    """float32[3 * D]."""
    boxed, zeros = nn.with_logical_partitioning, nn.initializers.zeros
    if self.key_bias:
      shape = (3, width)
      bias = self.param("qkv_bias", boxed(zeros, ("qkv", "heads")), shape)
      return bias.reshape(-1)
    q, v = (
      self.param(name, boxed(zeros, ("heads",)), (width,))
      for name in ("q_bias", "v_bias")
    )
    return jnp.concatenate([q, jnp.zeros_like(q), v])


class CrossAttention(nn.Module):
  """Queries from one sequence, keys and values from another."""

  num_heads: int
  dtype: Any = "float32"

  @nn.compact
  def __call__(self, x, context, *, mean_if_none=None, **kwargs):
    """Attends from x to the context.

    Args:
      x: float[B, L, D].
      context: float[B, M, D].
      mean_if_none: bool[B] or None; rows where it is True get the mean of all
        values in place of the attention's result.
      **kwargs: for `layers.attention`.

    Returns:
      float[B, L, D].
    """
    batch, length, width = x.shape
    dense = functools.partial(layers.dense, width, dtype=self.dtype)
    axes = ("embed", "heads")
    shape = (batch, -1, self.num_heads, width // self.num_heads)
    query = dense(axes, name="query")(x).reshape(shape)
    key = dense(axes, name="key")(context).reshape(shape)
    value = dense(axes, name="value")(context).reshape(shape)
    out = layers.attention(query, key, value, **kwargs)
    if mean_if_none is not None:
      mean = value.mean(1, keepdims=True)  # [B, 1, H, Dh]
      out = jnp.where(mean_if_none[:, None, None, None], mean, out)
    out = out.reshape(batch, length, width)
    return dense(axes[::-1], name="proj")(out)
