"""What the U-Net is made of: convolutions, residual and attention blocks.

Names and order are those of diffusers (see `unet`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models import activations, layers


class Conv(nn.Conv):
  """A convolution whose maps are split over the batch alone.

  Left to itself, XLA also splits channels and places; the gradients of whole
  U-Nets came out wrong that way (jax 0.10.2, CPU, 2 x 2 x 2 mesh).
  """

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to float[B, h, w, features]."""
    axes = ("act_batch", None, None, None)
    x = nn.with_logical_constraint(x, axes)
    return nn.with_logical_constraint(super().__call__(x), axes)


def conv(features, name, *, strides=1, dtype="float32", init=None):
  """3 x 3 with one pixel of zeros on each side, as torch pads."""
  kernel_init = init or nn.initializers.lecun_normal()
  axes = ("conv", None, "conv_in", "conv_out")
  return Conv(
    features,
    (3, 3),
    strides=strides,
    padding=((1, 1), (1, 1)),
    dtype=dtype,
    kernel_init=nn.with_logical_partitioning(kernel_init, axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[3:]),
    name=name,
  )


def group_norm(groups, epsilon, name):
  return nn.GroupNorm(
    num_groups=groups,
    epsilon=epsilon,
    use_fast_variance=False,
    dtype=jnp.float32,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
    name=name,
  )


def timestep_features(t: jax.Array, width: int) -> jax.Array:
  """Sinusoids of int[B] or float[B] as float32[B, width]: cosines first."""
  half = width // 2
  rates = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / half)
  angles = t.astype(jnp.float32)[:, None] * rates
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nn.Module):
  """Linear, SiLU, Linear on the sinusoids of t."""

  width: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps float[B, C] to float[B, width]."""
    axes = ("embed", "mlp")
    h = layers.dense(self.width, axes, name="linear_1", dtype=self.dtype)(
      features
    )
    axes = ("mlp", "embed")
    return layers.dense(self.width, axes, name="linear_2", dtype=self.dtype)(
      activations.silu(h)
    )


class ResnetBlock(nn.Module):
  """Two convolutions with GroupNorm and SiLU; the time enters between."""

  channels: int
  groups: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] and float[B, T] to float[B, h, w, channels]."""
    h = activations.silu(group_norm(self.groups, 1e-5, "norm1")(x))
    h = conv(self.channels, "conv1", dtype=self.dtype)(h)
    axes = ("time", "conv_out")
    shift = layers.dense(
      self.channels, axes, name="time_emb_proj", dtype=self.dtype
    )
    h = h + shift(activations.silu(time))[:, None, None]
    h = activations.silu(group_norm(self.groups, 1e-5, "norm2")(h))
    h = conv(self.channels, "conv2", dtype=self.dtype)(h)
    if x.shape[-1] != self.channels:
      axes = ("conv_in", "conv_out")
      x = layers.dense(
        self.channels, axes, name="conv_shortcut", dtype=self.dtype
      )(x)
    return x + h


class Attention(nn.Module):
  """Multi-head attention of float[B, L, D] to itself or to a condition."""

  num_heads: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, context=None, mask=None):
    """Maps float[B, L, D] (and float[B, N, Dc], bool[B, N]) to the first's."""
    width = x.shape[-1]
    context = x if context is None else context
    split = (self.num_heads, width // self.num_heads)

    def project(y, name):
      axes = ("embed", "heads")
      y = layers.dense(
        width, axes, name=name, use_bias=False, dtype=self.dtype
      )(y)
      return y.reshape(*y.shape[:2], *split)  # [B, L, H, Dh]

    out = layers.attention(
      project(x, "to_q"),
      project(context, "to_k"),
      project(context, "to_v"),
      mask=None if mask is None else mask[:, None, None],  # [B, 1, 1, N]
    ).reshape(*x.shape[:2], width)
    return layers.dense(
      width, ("heads", "embed"), name="to_out_0", dtype=self.dtype
    )(out)


class FeedForward(nn.Module):
  """GEGLU block with the exact GELU."""

  mult: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, L, D] to float[B, L, D]."""
    width = x.shape[-1]
    hidden = self.mult * width
    axes = ("embed", "mlp")
    h = layers.dense(2 * hidden, axes, name="net_0_proj", dtype=self.dtype)(x)
    h, gate = jnp.split(h, 2, axis=-1)  # [B, L, F] each
    h = h * activations.gelu(gate)
    return layers.dense(
      width, ("mlp", "embed"), name="net_2", dtype=self.dtype
    )(h)


class TransformerBlock(nn.Module):
  """Self-attention, cross-attention to the condition, feed-forward."""

  num_heads: int
  ff_mult: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, condition, mask=None):
    """Maps float[B, L, D], float[B, N, Dc] and bool[B, N] to float[B, L, D]."""
    attn1 = Attention(self.num_heads, self.dtype, name="attn1")
    attn2 = Attention(self.num_heads, self.dtype, name="attn2")
    x = x + attn1(layers.LayerNorm(name="norm1")(x))
    x = x + attn2(layers.LayerNorm(name="norm2")(x), condition, mask)
    ff = FeedForward(self.ff_mult, self.dtype, name="ff")
    return x + ff(layers.LayerNorm(name="norm3")(x))


class Transformer2D(nn.Module):
  """Transformer layers over the h * w places of a feature map."""

  num_layers: int
  num_heads: int
  groups: int
  ff_mult: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, condition, mask=None):
    """Maps float[B, h, w, C] and the condition to float[B, h, w, C]."""
    batch, height, width, channels = x.shape
    h = group_norm(self.groups, 1e-6, "norm")(x)
    h = h.reshape(batch, height * width, channels)
    axes = ("conv_in", "conv_out")
    h = layers.dense(channels, axes, name="proj_in", dtype=self.dtype)(h)
    for i in range(self.num_layers):
      block = TransformerBlock(
        self.num_heads, self.ff_mult, self.dtype, name=f"transformer_blocks_{i}"
      )
      h = block(h, condition, mask)
    h = layers.dense(channels, axes, name="proj_out", dtype=self.dtype)(h)
    return x + h.reshape(x.shape)


class Downsample(nn.Module):
  """Convolution of stride two."""

  channels: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to float[B, h / 2, w / 2, channels]."""
    return conv(self.channels, "conv", strides=2, dtype=self.dtype)(x)


class Upsample(nn.Module):
  """Nearest neighbour, twice the size, then a convolution."""

  channels: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to float[B, 2 h, 2 w, channels]."""
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    return conv(self.channels, "conv", dtype=self.dtype)(x)
