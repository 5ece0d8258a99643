"""Linear layers of the language model, attention of the vision transformers."""

import functools
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models import layers, low_precision
from lavit_jax.models import matmul as matmul_lib

# lecun_normal over [D, 3, H * Dh], where only the first axis is fan-in.
_QKV_INIT = layers.traced_once(
  nn.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=(1, 2)
  )
)


class Linear(nn.Module):
  """Matrix product without a bias, of a float or int8 kernel.

  A kernel int8[D, F] has `scale` float32[F] beside it. If the collection
  "lora" has `a` float[D, R] and `b` float[R, F] under the layer's name, x a b
  is added to the result. `saved_as` is that of `matmul.linear`.
  """

  features: int
  axes: tuple[str, str]
  dtype: str
  matmul: str = ""
  saved_as: str = "product"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[..., D] to dtype[..., F]."""
    init = layers.partitioned(layers.LECUN_NORMAL, self.axes)
    kernel = self.param("kernel", init, (x.shape[-1], self.features))
    scale: Any = self.get_variable("params", "scale")
    x = x.astype(self.dtype)
    if scale is None and self.matmul:
      kernel = kernel.astype(self.dtype)
      y = low_precision.linear(x, kernel, self.matmul, self.saved_as)
    elif scale is None:
      y = matmul_lib.linear(x, kernel.astype(self.dtype), self.saved_as)
    else:
      y = matmul_lib.scaled(x, kernel, scale)
    a: Any = self.get_variable("lora", "a")
    b: Any = self.get_variable("lora", "b")
    if a is None:
      return y
    with jax.named_scope("lora"):  # cost.scopes reads it
      low = matmul_lib.linear(x, a.astype(self.dtype))
      return y + matmul_lib.linear(low, b.astype(self.dtype))


class SelfAttention(nn.Module):
  """Self-attention with one fused kernel for queries, keys and values.

  The three kernels are stacked on an axis, `qkv_kernel` [D, 3, D], so that a
  split over heads never cuts across q, k and v.

  Attributes:
    num_heads: H.
    key_bias: whether keys have a bias (`qkv_bias`). EVA's have none: its
      biases are `q_bias` and `v_bias`.
    dtype: of the computation; parameters are float32.
  """

  num_heads: int
  key_bias: bool = True
  dtype: Any = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
    """Maps float[B, L, D] to the same; kwargs go to `layers.attention`."""
    width = x.shape[-1]
    boxed = layers.partitioned
    kernel = self.param(
      "qkv_kernel",
      boxed(_QKV_INIT, ("embed", "qkv", "heads")),
      (width, 3, width),
    )
    dtype = jnp.dtype(self.dtype)
    kernel = kernel.astype(dtype).reshape(width, 3 * width)
    qkv = matmul_lib.linear(x.astype(dtype), kernel)
    qkv = qkv + self._bias(width).astype(dtype)
    qkv = einops.rearrange(
      qkv, "b l (n h d) -> b l n h d", n=3, h=self.num_heads
    )
    out = layers.attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], **kwargs)
    out = einops.rearrange(out, "b l h d -> b l (h d)")
    axes = ("heads", "embed")
    return layers.dense(width, axes, dtype=dtype, name="proj")(out)

  def _bias(self, width):
    """Returns the bias of queries, keys and values, float32[3 * D]."""
    boxed, zeros = layers.partitioned, nn.initializers.zeros
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
  """Attention with queries of one sequence, keys and values of another."""

  num_heads: int
  dtype: Any = "float32"

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    context: jax.Array,
    *,
    use_mean: jax.Array | None = None,
    **kwargs: Any,
  ) -> jax.Array:
    """Attends from x to the context.

    Args:
      x: float[B, L, D].
      context: float[B, M, D].
      use_mean: bool[B] or None; rows where it is True get the mean of all
        values in place of the attention's result.
      **kwargs: for `layers.attention`.

    Returns:
      float[B, L, D].
    """
    width = x.shape[-1]
    dense = functools.partial(layers.dense, width, dtype=self.dtype)
    axes = ("embed", "heads")
    split = functools.partial(
      einops.rearrange, pattern="b l (h d) -> b l h d", h=self.num_heads
    )
    query = split(dense(axes, name="query")(x))
    key = split(dense(axes, name="key")(context))
    value = split(dense(axes, name="value")(context))
    out = layers.attention(query, key, value, **kwargs)
    if use_mean is not None:
      mean = value.mean(1, keepdims=True)  # [B, 1, H, Dh]
      out = jnp.where(use_mean[:, None, None, None], mean, out)
    out = einops.rearrange(out, "b l h d -> b l (h d)")
    return dense(axes[::-1], name="proj")(out)
